"""What happens when a module is imported: callbacks, and refusals. All of it can be taken back.

wrapt keeps what it is given until the module is imported, which most modules never are. So each module is registered
there once a process, and who still waits for it stands here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from threading import RLock
from types import ModuleType
from typing import TypeVar

import wrapt

T = TypeVar("T")
Callback = Callable[[ModuleType], None]
Refusal = Callable[[str], Exception]

_waiting: dict[str, list[Callback]] = {}
_registered: set[str] = set()
_refused: dict[str, list[Refusal]] = {}
_lock = RLock()


def when_imported(name: str, callback: Callback) -> Callable[[], None]:
    """Call `callback` with a module, now if it has been imported, else once it is.

    Returns:
        What takes it back; it does nothing if the call has been made.

    Raises:
        Exception: whatever the callback raises, now or from the import.
    """
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
        return lambda: None
    with _lock:
        _waiting.setdefault(name, []).append(callback)
        new = name not in _registered
        _registered.add(name)
    if new:
        # Called at once if another thread has imported it meanwhile.
        wrapt.register_post_import_hook(_imported, name)
    return partial(_take_back, name, callback)


def refuse_import(names: Iterable[str], refusal: Refusal) -> Callable[[], None]:
    """Let each import of these modules raise, until that is taken back. Those that have been imported stay.

    Args:
        refusal: takes the name, returns what is raised.

    Returns:
        What takes it back.
    """
    refused = tuple(names)
    with _lock:
        for name in refused:
            _refused.setdefault(name, []).append(refusal)
        # In front of all others, and there only while it has something to refuse.
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    return partial(_allow, refused, refusal)


class _RefusingFinder:
    """Finds nothing, and raises for a module that is refused."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        for refusal in _refused.get(name, ())[:1]:
            raise refusal(name)


_finder = _RefusingFinder()


def _imported(module: ModuleType) -> None:
    with _lock:
        _registered.discard(module.__name__)
        callbacks = _waiting.pop(module.__name__, [])
    for callback in callbacks:
        callback(module)


def _take_back(name: str, callback: Callback) -> None:
    with _lock:
        _remove(_waiting, name, callback)


def _allow(names: Iterable[str], refusal: Refusal) -> None:
    with _lock:
        for name in names:
            _remove(_refused, name, refusal)
        if not _refused and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


def _remove(registry: dict[str, list[T]], name: str, entry: T) -> None:
    """Remove an entry, if it is there, and the name with its last one."""
    entries = registry.get(name, [])
    if entry in entries:
        entries.remove(entry)
    if not entries:
        registry.pop(name, None)
