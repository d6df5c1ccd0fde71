"""Checks the declared patches against what is installed, applies and reports them, and undoes them.

A hook is a wrapt wrapper `(wrapped, instance, args, kwargs)`. It, or an edit, is applied when the symbol's module is
imported, now or later, and taken off again by `PatchSet.undo`. Hooks run under a guard, see `guarded_hook`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pkgutil import resolve_name
from types import FunctionType, ModuleType
from typing import Any

import wrapt

from fp16_patch.patching.code_object_patch import edit
from fp16_patch.patching.declarations import Patch, Status, Variant, Verdict, declared_patches
from fp16_patch.patching.guarded_hook import guarded
from fp16_patch.patching.import_hooks import refuse_import, when_imported
from fp16_patch.plan.errors import PatchError
from fp16_patch.plan.guard import OurPart
from fp16_patch.plan.plan import MODE_ENV, Plan

logger = logging.getLogger(__name__)


@dataclass
class PatchSet:
    """Holds the patches of one process and what became of them.

    Attributes:
        dtype: torch's name of the plan's dtype; None where it only observes, and an error of a hook stops nothing.
    """

    patches: tuple[Patch, ...]
    strict: bool = True
    dtype: str | None = None
    applied: set[str] = field(default_factory=set)
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _live: bool = False

    @classmethod
    def of(cls, plan: Plan) -> PatchSet:
        """Make the set of all declared patches; only of the observing ones when the plan changes nothing."""
        patches = tuple(patch for patch in declared_patches() if plan.overrides_dtype or patch.observes)
        return cls(patches, plan.strict, plan.dtype)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(patch.verify() for patch in self.patches)

    def install(self) -> None:
        """Apply each patch that fits, at once or when its module is imported.

        Raises:
            PatchError: strict, and a framework's code is unknown to a patch. Nothing is applied then.
        """
        if self._live:
            return
        unknown = [verdict for verdict in self.verdicts if verdict.unknown]
        if unknown and self.strict:
            raise PatchError("\n".join(str(verdict) for verdict in unknown))
        for verdict in unknown:
            logger.warning("%s", verdict)
        self._live = True
        try:
            for verdict in self.verdicts:
                # A changed symbol is wrapped all the same, as not strict says; one that is gone has nothing to wrap.
                if verdict.status in (Status.APPLIES, Status.CHANGED):
                    self._apply_when_imported(verdict)
        except Exception:
            self.undo()
            raise

    def undo(self) -> None:
        """Put every replaced attribute back; patches of modules not yet imported will not be applied any more."""
        self._live = False
        while self._undo:
            self._undo.pop()()
        self.applied.clear()

    def report(self) -> dict[str, str]:
        """Map patch names to `applied`, `waiting` (its module is not imported here), `exempt` or `absent`."""
        return {verdict.patch.name: self._state_of(verdict) for verdict in self.verdicts}

    def owed(self, framework: str, kind: str) -> tuple[str, ...]:
        """Name the patches that must be live in a process of this kind, in the installed release."""
        return tuple(
            verdict.patch.name
            for verdict in self.verdicts
            if verdict.status is not Status.EXEMPT
            and verdict.patch.framework == framework
            and kind in verdict.patch.live_in
        )

    def _state_of(self, verdict: Verdict) -> str:
        if verdict.patch.name in self.applied:
            return "applied"
        return {Status.ABSENT: "absent", Status.EXEMPT: "exempt"}.get(verdict.status, "waiting")

    def _apply_when_imported(self, verdict: Verdict) -> None:
        name, variant = verdict.patch.name, verdict.variant
        part = self._part_of(verdict)

        def on_import(module: ModuleType) -> None:
            if self._live and name not in self.applied:
                try:
                    self._apply(variant, module, part)
                except Exception as failure:
                    self._not_applied(variant, part, failure)
                else:
                    self.applied.add(name)

        self._undo.append(when_imported(variant.module, on_import))

    def _part_of(self, verdict: Verdict) -> OurPart:
        what = f"the patch {verdict.patch.name} (of {verdict.patch.package} {verdict.release})"
        return OurPart(logger, what, lambda: self.dtype is None)

    def _not_applied(self, variant: Variant, part: OurPart, failure: Exception) -> None:
        """End the import, and each that follows: who imports again would get the module as it is without us."""
        if part.contains(failure):
            return
        why = (
            f"fp16_patch failed in {part.what} ({type(failure).__name__}: {failure}). "
            f"Set {MODE_ENV}=off to run without it"
        )
        self._undo.append(refuse_import([variant.module], lambda name: PatchError(f"{name} is not imported: {why}")))
        raise failure

    def _apply(self, variant: Variant, module: ModuleType, part: OurPart) -> None:
        # Of a class's attribute that is the descriptor, inherited or not: a classmethod is wrapped as one.
        owner, name, descriptor = wrapt.resolve_path(module, variant.qualname)
        if variant.edit:
            self._undo.append(edit(descriptor, variant.edit, variant.edit_to or str(self.dtype)))
            return
        original = getattr(owner, name)
        wrapper = _wrapper_of(descriptor, owner)(descriptor, guarded(variant.load_hook(), part))
        self._replace(owner, name, wrapper)
        for reference in variant.bound:
            self._rebind(reference, original, wrapper)

    def _rebind(self, reference: str, original: Any, wrapper: Any) -> None:
        # Only modules imported before us hold the old object; later ones import the wrapper.
        module_name, _, name = reference.partition(":")
        module = sys.modules.get(module_name)
        if module is not None and getattr(module, name, None) is original:
            self._replace(module, name, wrapper)

    def _replace(self, owner: Any, name: str, wrapper: Any) -> None:
        inherited, original = name not in vars(owner), vars(owner).get(name)
        self._undo.append(lambda: delattr(owner, name) if inherited else setattr(owner, name, original))
        setattr(owner, name, wrapper)


class _Wrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """Is pickled by its name, as a function is: Ray sends an actor's class with all that its methods refer to."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return resolve_name, (f"{self.__module__}:{self.__qualname__}",)


class _MethodWrapper(_Wrapper):
    """Is itself when read from a class, as a function is: pickle compares what it has with what it finds there.

    Without it, Ray would send the function that we wrapped, to workers that then run it.
    """

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else super().__get__(instance, owner)

    def __call__(self, instance: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.__get__(instance, type(instance))(*args, **kwargs)


def _wrapper_of(descriptor: Any, owner: Any) -> type[_Wrapper]:
    return _MethodWrapper if isinstance(owner, type) and isinstance(descriptor, FunctionType) else _Wrapper
