"""Runs a hook such that its own errors are told from those of the framework's function that it wraps.

Where the plan only observes, an error of the hook is one warning, and what the framework's function does is what its
caller sees: it is called once, with the arguments that it was given, and its result or its exception is passed on.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import wrapt

from fp16_patch.plan.guard import OurPart

Hook = Callable[[Any, Any, Any, Any], Any]


def guarded(hook: Hook, part: OurPart) -> Hook:
    """Return the hook under a guard: a function, a coroutine function or a generator function, as the hook is.

    Args:
        hook: a wrapt wrapper, `(wrapped, instance, args, kwargs)`. It calls `wrapped` in its own thread. One that is a
            generator only reads what `wrapped` yields, and yields one item for each.

    Raises:
        TypeError: it is an asynchronous generator function, which this does not know.
    """
    if inspect.isasyncgenfunction(hook):
        raise TypeError(f"{hook.__module__}.{hook.__qualname__} is an asynchronous generator, which no hook may be")
    if inspect.iscoroutinefunction(hook):
        return _of_coroutines(hook, part)
    return _of_generators(hook, part) if inspect.isgeneratorfunction(hook) else _of_functions(hook, part)


def _of_functions(hook: Hook, part: OurPart) -> Hook:
    def run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        call = _Call(wrapped)
        try:
            try:
                return hook(call, instance, args, dict(kwargs))
            except Exception as failure:
                if call.self_raised(failure) or not part.contains(failure):
                    raise
            # Outside of the handler: an exception of the framework's is not to have ours for its context.
            return call.self_outcome() if call.self_made() else wrapped(*args, **kwargs)
        finally:
            call.self_forget()

    return run


def _of_coroutines(hook: Hook, part: OurPart) -> Hook:
    async def run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        call = _AwaitedCall(wrapped)
        try:
            try:
                return await hook(call, instance, args, dict(kwargs))
            except Exception as failure:
                if call.self_raised(failure) or not part.contains(failure):
                    raise
            return call.self_outcome() if call.self_made() else await wrapped(*args, **kwargs)
        finally:
            call.self_forget()

    return run


def _of_generators(hook: Hook, part: OurPart) -> Hook:
    def run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        call = _IteratedCall(wrapped)
        try:
            try:
                for item in hook(call, instance, args, dict(kwargs)):
                    call.self_pass_on()
                    yield item
                return
            except Exception as failure:
                if call.self_raised(failure) or not part.contains(failure):
                    raise
            yield from call.self_left() if call.self_made() else wrapped(*args, **kwargs)
        finally:
            call.self_forget()

    return run


class _Call(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
    """Is the framework's function to a hook, and remembers what came of calling it."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        self._self_results: list[Any] = []
        self._self_failures: list[Exception] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self.__wrapped__(*args, **kwargs)
        except Exception as failure:
            self._self_failures.append(failure)
            raise
        self._self_results.append(result)
        return result

    def self_raised(self, failure: Exception) -> bool:
        """Return whether an exception is the framework's own."""
        return any(failure is raised for raised in self._self_failures)

    def self_made(self) -> bool:
        return bool(self._self_results or self._self_failures)

    def self_outcome(self) -> Any:
        """Return what the framework's function returned, first if it was called again; raise what it raised instead."""
        if self._self_results:
            return self._self_results[0]
        raise self._self_failures[0]

    def self_forget(self) -> None:
        """Let go of exceptions, whose tracebacks lead here and to the tensors of every frame on the way."""
        self._self_failures.clear()
        self._self_results.clear()


class _AwaitedCall(_Call):
    """The same of a coroutine function."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = await self.__wrapped__(*args, **kwargs)
        except Exception as failure:
            self._self_failures.append(failure)
            raise
        self._self_results.append(result)
        return result


class _IteratedCall(_Call):
    """The same of a generator function: it can go on where the hook has left off."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        self._self_read: deque[Any] = deque()

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self._self_results.append(iter(self.__wrapped__(*args, **kwargs)))
        return self._self_items()

    def self_pass_on(self) -> None:
        """Note that the hook has yielded an item."""
        if self._self_read:
            self._self_read.popleft()

    def self_left(self) -> Iterator[Any]:
        """Yield what the hook has read and not yielded, then what it has not read."""
        yield from self._self_read
        yield from self._self_results[0]

    def _self_items(self) -> Iterator[Any]:
        while True:
            try:
                item = next(self._self_results[0])
            except StopIteration:
                return
            except Exception as failure:
                self._self_failures.append(failure)
                raise
            self._self_read.append(item)
            yield item
