"""An error of a hook stops nothing where the plan observes, and says whose it is where the plan decides."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp16_patch import PlanError
from fp16_patch.patching.call_arguments import argument, takes
from fp16_patch.patching.guarded_hook import guarded
from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.guard import OurPart, add_note

logger = logging.getLogger("tests.guarded_hook")


class Theirs(Exception):
    """Raised by the framework."""


class Ours(Exception):
    """Raised by a hook."""


PLACES = ("nowhere", "before", "after", "handling", "finally")
OUTCOMES = ("returns", "raises")


class Framework:
    """Has a function of each kind, which counts its calls."""

    def __init__(self, outcome: str) -> None:
        self.outcome, self.calls, self.raised = outcome, [], Theirs("of the framework")  # type: ignore[var-annotated]

    def function(self, value: int, times: int = 1) -> tuple[int, int]:
        self.calls.append((value, times))
        if self.outcome == "raises":
            raise self.raised
        return value, times

    async def coroutine(self, value: int, times: int = 1) -> tuple[int, int]:
        await asyncio.sleep(0)
        return self.function(value, times)

    def generator(self, value: int, times: int = 1) -> Iterator[int]:
        self.calls.append((value, times))
        yield from range(value)
        if self.outcome == "raises":
            raise self.raised


def hook_failing(place: str) -> Callable[..., Any]:
    def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        kwargs["times"] = 7  # its own copy
        if place == "before":
            raise Ours(place)
        try:
            result = wrapped(*args, times=2)
        except Theirs:
            if place == "handling":
                raise Ours(place) from None
            raise
        finally:
            if place == "finally":
                raise Ours(place)
        if place == "after":
            raise Ours(place)
        return result

    return hook


def coroutine_hook_failing(place: str) -> Callable[..., Any]:
    async def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if place == "before":
            raise Ours(place)
        try:
            result = await wrapped(*args, times=2)
        except Theirs:
            if place == "handling":
                raise Ours(place) from None
            raise
        finally:
            if place == "finally":
                raise Ours(place)
        await asyncio.sleep(0)
        if place == "after":
            raise Ours(place)
        return result

    return hook


def outcome_of(call: Callable[[], Any]) -> Any:
    """What a call returned, or what it raised."""
    try:
        return call()
    except Exception as failure:
        return failure


def part(observes: bool) -> OurPart:
    return OurPart(logger, "the patch steps (of framework 1.0)", lambda: observes)


def run_of(kind: str, place: str, framework: Framework, our: OurPart) -> Callable[[], Any]:
    if kind == "function":
        hook = guarded(hook_failing(place), our)
        return lambda: hook(framework.function, framework, (3,), {"times": 2})
    hook = guarded(coroutine_hook_failing(place), our)
    assert inspect.iscoroutinefunction(hook)
    return lambda: asyncio.run(hook(framework.coroutine, framework, (3,), {"times": 2}))


@pytest.mark.parametrize("kind", ["function", "coroutine"])
@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("place", PLACES)
def test_where_it_observes_the_caller_sees_the_framework_alone(
    kind: str, outcome: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    framework = Framework(outcome)
    call = run_of(kind, place, framework, part(observes=True))

    seen = outcome_of(call)
    assert seen == (3, 2) if outcome == "returns" else seen is framework.raised
    assert framework.calls == [(3, 2)]
    assert framework.raised.__context__ is None or place in ("handling", "finally")
    outcome_of(call)
    assert len(framework.calls) == 2

    failed = {"nowhere": False, "before": True, "after": outcome == "returns", "handling": outcome == "raises"}
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == (
        [
            "fp16_patch failed in the patch steps (of framework 1.0); the run goes on without it, as "
            f"FP16_PATCH=observe: Ours: {place}"
        ]
        if failed.get(place, True)
        else []
    )


@pytest.mark.parametrize("kind", ["function", "coroutine"])
@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("place", PLACES)
def test_where_it_decides_an_error_says_whose_it_is(kind: str, outcome: str, place: str) -> None:
    framework = Framework(outcome)
    seen = outcome_of(run_of(kind, place, framework, part(observes=False)))
    if isinstance(seen, Ours):
        said = "".join(traceback.format_exception(seen))
        assert "was raised in fp16_patch" in said
        assert "in the patch steps (of framework 1.0), and not in the framework's own code" in said
        assert "report it" in said
    elif isinstance(seen, Theirs):
        assert seen is framework.raised
        assert "fp16_patch 0" not in "".join(traceback.format_exception(seen))
    else:
        assert seen == (3, 2)


@given(
    there=st.integers(0, 6),
    ours_at=st.none() | st.integers(0, 7),
    outcome=st.sampled_from(OUTCOMES),
    ahead=st.booleans(),
    taken=st.integers(1, 8),
)
def test_a_generator_goes_on_where_its_hook_ends(
    there: int, ours_at: int | None, outcome: str, ahead: bool, taken: int
) -> None:
    def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Iterator[int]:
        if ours_at == 0 and not ahead:
            raise Ours
        for number, item in enumerate(wrapped(*args, **kwargs)):
            if number == ours_at and ahead:  # an item is read, and not yielded
                raise Ours
            yield item
            if number == ours_at:
                raise Ours

    framework, alone = Framework(outcome), Framework(outcome)
    run = guarded(hook, part(observes=True))

    def items(of: Iterator[int], raised: Exception) -> list[Any]:
        found: list[Any] = []
        try:
            for item in of:
                found.append(item)
                if len(found) == taken:
                    break
        except Theirs as failure:
            found.append(failure is raised)
        return found

    seen = items(run(framework.generator, framework, (there,), {}), framework.raised)
    assert seen == items(alone.generator(there), alone.raised)
    assert len(framework.calls) == 1


def test_our_own_messages_to_the_user_are_raised_in_either_case() -> None:
    refused = PlanError([Conflict("key", "value", "cannot be", "change it")])

    def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        raise refused

    for observes in (True, False):
        assert outcome_of(lambda o=observes: guarded(hook, part(o))(len, None, ("abc",), {})) is refused  # type: ignore[misc]
    assert not hasattr(refused, "__notes__")


def test_what_ends_a_process_is_nobodys_error() -> None:
    def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(hook, part(observes=True))(len, None, ("abc",), {})


def test_a_hook_in_a_hook_is_told_apart() -> None:
    framework = Framework("returns")
    inner = guarded(hook_failing("after"), OurPart(logger, "the inner patch", lambda: False))
    outer = guarded(hook_failing("nowhere"), OurPart(logger, "the outer patch", lambda: False))
    seen = outcome_of(
        lambda: outer(lambda *args, **kwargs: inner(framework.function, None, args, kwargs), None, (3,), {})
    )
    said = "".join(traceback.format_exception(seen))
    assert "the inner patch" in said
    assert "the outer patch" not in said


def test_a_call_that_is_made_again_after_an_exception_is_the_hooks_own_affair() -> None:
    framework = Framework("raises")

    def retry(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        try:
            return wrapped(*args, **kwargs)
        except Theirs:
            framework.outcome = "returns"
            return wrapped(*args, **kwargs)

    assert guarded(retry, part(observes=False))(framework.function, None, (3,), {}) == (3, 1)


def test_the_framework_sees_its_own_function_in_what_a_hook_is_given() -> None:
    seen: list[Any] = []

    def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        seen.extend([argument(wrapped, args, kwargs, "value"), takes(wrapped, "times"), wrapped.__module__])
        return wrapped(*args, **kwargs)

    framework = Framework("returns")
    guarded(hook, part(observes=True))(framework.function, framework, (3,), {})
    assert seen == [3, True, __name__]


def test_threads_do_not_share_what_came_of_their_calls() -> None:
    def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        barrier.wait()
        raise Ours(str(result))

    barrier = threading.Barrier(4)
    run, results = guarded(hook, part(observes=True)), {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: run(abs, None, (-n,), {})}))  # type: ignore[misc]
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: n for n in range(4)}


@pytest.mark.parametrize("observes", [True, False])
def test_an_exception_does_not_keep_the_frames_it_came_through(observes: bool) -> None:
    class Batch:
        """A tensor of that step."""

    def fails(batch: Batch) -> None:
        raise Theirs

    batch = Batch()
    gone = weakref.ref(batch)
    with pytest.raises(Theirs):
        guarded(hook_that_calls, part(observes))(fails, None, (batch,), {})
    del batch
    # Not by the collector of cycles: a step that ran out of memory is tried again at once.
    assert gone() is None


def hook_that_calls(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


def test_an_asynchronous_generator_is_no_hook() -> None:
    async def hook(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        yield

    with pytest.raises(TypeError, match="is an asynchronous generator, which no hook may be"):
        guarded(hook, part(observes=True))


def test_before_python_311_a_note_is_the_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(Exception):
        add_note = property()  # as if there were none

    try:
        try:
            raise Theirs("first")
        except Theirs as first:
            raise Old("second") from first
    except Old as failure:
        add_note(failure, "whose it is")
        said = "".join(traceback.format_exception(failure))
    assert [line for line in said.splitlines() if line.partition(":")[2]][-1].endswith("second")
    assert said.index("whose it is") < said.index("first") < said.index("second")
    assert sys.exc_info() == (None, None, None)
