"""Reads the lines of running trainings: from the files of a record, or from the root actors in a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from fp16_patch.mismatch.collection.actors import NAMESPACE, root_name
from fp16_patch.mismatch.record.lines import Line, is_line, parse_line
from fp16_patch.mismatch.record.reading import MISMATCH, RECORD_FOLDER, STEPS
from fp16_patch.mismatch.report.live import HISTORY, SourceLost
from fp16_patch.untrusted.paths import is_folder, reason_of
from fp16_patch.untrusted.reading import Unreadable, opened

TAIL_BYTES = 1 << 24
"""Bytes at the end of a file that are read at first, and at a time: some hundred lines."""

COMPARED_BYTES = 1 << 16
"""Of what was read, to see that the file still is the same: a line or more, in which a step and its time stand."""

ANSWER_TIMEOUT_S = 10.0
TOKEN_HINT = (
    "A cluster that asks for a token, as Ray's local ones do by default, wants RAY_AUTH_MODE=token here as well; "
    "without Ray, give the directory of a run"
)


class RecordFiles:
    """Follows the files of a run record, which may still be empty or missing.

    Raises:
        FileNotFoundError: there is no such directory.
    """

    def __init__(self, path: Path) -> None:
        if not is_folder(path):
            raise FileNotFoundError(f"{path}: no such directory. Give the output directory of a run")
        self._path = path
        self._tails: dict[Path, _Tail] = {}

    def poll(self) -> dict[str, list[Line]]:
        """Return the lines that were added since the last call."""
        if not is_folder(self._path):
            raise SourceLost(f"{self._path} is gone")
        folder = self._path / RECORD_FOLDER if is_folder(self._path / RECORD_FOLDER) else self._path
        tails = [self._tails.setdefault(folder / name, _Tail(folder / name)) for name in (MISMATCH, STEPS)]
        return {str(self._path): [line for tail in tails for line in tail.read()]}


@dataclass(frozen=True)
class _Written:
    """Which file it is and where the lines that were read end; ``last``: the bytes before that place."""

    device: int
    inode: int
    place: int
    last: bytes


class _Tail:
    """Reads the lines added to a file since the last read; a file that was replaced or written over is read anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: _Written | None = None

    def read(self) -> list[Line]:
        try:
            with opened(self._path) as file:
                text = self._added(file)
        except FileNotFoundError:
            return []
        except (OSError, Unreadable) as problem:
            raise SourceLost(f"{self._path} cannot be read: {reason_of(problem)}") from problem
        return [line for line in map(parse_line, text.splitlines()) if line is not None]

    def _added(self, file: BinaryIO) -> bytes:
        """Return the whole lines since the last read, of ``TAIL_BYTES`` at most, and remember where they end."""
        status = os.fstat(file.fileno())
        known = self._read
        if known is None or not _goes_on(file, status, known):
            known = _Written(status.st_dev, status.st_ino, 0, b"")
        place = max(known.place, status.st_size - TAIL_BYTES)
        file.seek(place)
        added = file.read(TAIL_BYTES)
        whole = added[: added.rfind(b"\n") + 1]
        last = (known.last + whole)[-COMPARED_BYTES:] if place == known.place else whole[-COMPARED_BYTES:]
        self._read = replace(known, place=place + len(whole), last=last)
        return whole


def _goes_on(file: BinaryIO, status: os.stat_result, known: _Written) -> bool:
    """Return whether it is the file that was read, and what was read last still stands where it stood."""
    if (status.st_dev, status.st_ino) != (known.device, known.inode) or status.st_size < known.place:
        return False
    # A file that is written over in place keeps its number.
    file.seek(known.place - len(known.last))
    return file.read(len(known.last)) == known.last


class Cluster:
    """Asks the root actors of all runs in a Ray cluster.

    Raises:
        SourceLost: there is no Ray here, or no cluster at the address.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._roots: dict[str, Any] = {}
        try:
            import ray
        except ImportError:
            raise SourceLost("ray is not installed here: give the directory of a run instead") from None
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as problem:
            reason = _first_line(problem).rstrip(".")
            raise SourceLost(f"no way to the Ray cluster at {address}: {reason}. {TOKEN_HINT}") from problem

    def poll(self) -> dict[str, list[Line]]:
        """Return the last lines of every run that answers; one that is over does not."""
        import ray

        self._require_cluster()
        try:
            answers = {name: root.history.remote(HISTORY) for name, root in self._find().items()}
            if answers:
                ray.wait([*answers.values()], num_returns=len(answers), timeout=ANSWER_TIMEOUT_S)
            return {name: lines for name, answer in answers.items() if (lines := self._lines(name, answer)) is not None}
        except Exception as problem:
            raise SourceLost(f"the Ray cluster at {self._address} is gone: {_first_line(problem)}") from problem

    def _require_cluster(self) -> None:
        """Raise at once if the cluster is gone: Ray itself would wait a minute and then end this process."""
        import ray

        host, port = ray.get_runtime_context().gcs_address.rsplit(":", 1)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
        except OSError as problem:
            raise SourceLost(f"the Ray cluster at {self._address} is gone") from problem

    def _find(self) -> dict[str, Any]:
        import ray
        from ray.util import list_named_actors

        ending = root_name("")
        listed = [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
        for name in listed:
            if name.endswith(ending) and name not in self._roots:
                self._roots[name] = ray.get_actor(name, namespace=NAMESPACE)
        return self._roots

    def _lines(self, name: str, answer: Any) -> list[Line] | None:
        """Return a root's lines; None if its run is over or it does not answer in time."""
        import ray

        try:
            return records(ray.get(answer, timeout=0))
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayActorError:
            del self._roots[name]
            return None


def records(history: Iterable[dict[str, Any]]) -> list[Line]:
    """Take the lines out of a root's history, where each is in an envelope with its file's name, or as it is."""
    lines = (entry.get("record", entry) for entry in history if isinstance(entry, dict))
    return [line for line in lines if is_line(line)]


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
