"""What DeepSpeed's checkpoints hold of a scaler and of step counters: read as data, whatever it has become."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("deepspeed")
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from hypothesis import given, settings
from hypothesis import strategies as st

from fp16_patch import Plan
from fp16_patch.openrlhf.deepspeed import checkpoint
from fp16_patch.openrlhf.deepspeed.step import DeepSpeedStep
from fp16_patch.scaling import agreed_state
from fp16_patch.scaling.saved_state import DEEPSPEED_SCALER, HISTORY, SavedState, is_scale
from fp16_patch.scaling.scaler import StepHistory

pytestmark = pytest.mark.openrlhf

PLAN = Plan(init_scale=256, min_scale=2, growth_interval=50, hysteresis=2)
COUNTED = {"fp16_patch": {"history": {"attempted": 9, "skipped_total": 1}}, "global_step": 7}


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.distributed, "get_rank", lambda: 0)
        patched.setattr(agreed_state, "gather", lambda own: [own])
        patched.setattr(checkpoint, "current_plan", lambda: PLAN)
        yield


def scaler_of(scale: float, window: int, hysteresis: int) -> Any:
    return DynamicLossScaler(scale, window, 2, hysteresis, consecutive_hysteresis=False)


def engine_of_a_new_run() -> Any:
    optimizer = SimpleNamespace(loss_scaler=scaler_of(256.0, 50, 2), dynamic_loss_scale=True)
    return SimpleNamespace(optimizer=optimizer)


def load(restored: Any, states: Any, path: str | None = "/a/step_9") -> Any:
    """An engine after DeepSpeed has put what it restored into its optimizer."""
    engine = engine_of_a_new_run()

    def stock(model: Any) -> tuple[str | None, Any]:
        model.optimizer.loss_scaler = restored
        return path, states

    assert checkpoint.load_ckpt(stock, None, (engine,), {}) == (path, states)
    return engine


def saved(**numbers: Any) -> Any:
    """Of a run with settings of its own."""
    scaler = scaler_of(1024.0, 1000, 4)
    vars(scaler).update({"cur_iter": 9, "last_overflow_iter": 3, **numbers})
    return scaler


def test_numbers_are_the_saved_ones_and_settings_the_plans(caplog: pytest.LogCaptureFixture) -> None:
    engine = load(saved(), COUNTED)
    scaler = engine.optimizer.loss_scaler
    assert (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter) == (1024.0, 9, 3)
    assert (scaler.scale_window, scaler.min_scale, scaler.delayed_shift, scaler.cur_hysteresis) == (50, 2, 2, 2)
    assert DeepSpeedStep.of(engine).history == StepHistory(attempted=9, skipped_total=1)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("restored", "why"),
    [
        *(
            (saved(cur_scale=scale), f"its cur_scale is {scale}")
            for scale in (math.nan, math.inf, 0.0, -4.0, 1e39, True)
        ),
        (saved(cur_iter="9"), "its cur_iter is 9, which is not a count"),
        (saved(last_overflow_iter=1.5), "its last_overflow_iter is 1.5"),
        (LossScaler(1.0), "there is none (saved by a run that scaled no loss?)"),
        (None, "there is none"),
        ({"cur_scale": 8.0}, "there is none"),
    ],
    ids=lambda value: None,
)
def test_a_scaler_that_cannot_be_is_a_new_one_and_named_once(
    restored: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load(restored, COUNTED)
    assert isinstance(engine.optimizer.loss_scaler, DynamicLossScaler)
    assert engine.optimizer.loss_scaler.cur_scale == 256.0
    assert engine.optimizer.dynamic_loss_scale is True
    assert DeepSpeedStep.of(engine).history.attempted == 9
    (warning,) = caplog.messages
    assert f"/a/step_9 not all can be used: loss scale: {why}" in warning
    assert "the loss scale starts at 256, and step counters go on" in warning


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        (None, "there are none (saved without fp16_patch?)"),
        ({}, "there are none"),
        ({"history": {"attempted": "many"}}, "its attempted is many, which is not a count"),
        ({"history": ["add"]}, "it holds a list"),
        ({"history": {"attempted": 1, "skipped_total": 2}}, "it counts more skipped steps than steps"),
    ],
)
def test_counters_that_cannot_be_start_at_0_and_the_scale_goes_on(
    ours: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load(saved(), {} if ours is None else {"fp16_patch": ours})
    assert engine.optimizer.loss_scaler.cur_scale == 1024.0
    assert DeepSpeedStep.of(engine).history == StepHistory()
    (warning,) = caplog.messages
    assert f"step counters: {why}" in warning


def test_without_a_checkpoint_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    engine = load(engine_of_a_new_run().optimizer.loss_scaler, {}, path=None)
    assert engine.optimizer.loss_scaler.cur_scale == 256.0
    assert not caplog.messages


def test_a_rank_that_read_another_scale_goes_on_at_the_lowest_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rank_0 = SavedState(None, None, {"loss scale": "its cur_scale is nan, which is not a loss scale"})
    rank_1 = SavedState(dict.fromkeys(DEEPSPEED_SCALER, 4), dict.fromkeys(("attempted",), 5))
    monkeypatch.setattr(agreed_state, "gather", lambda own: [rank_0, rank_1, own])
    engine = load(saved(), COUNTED)
    assert engine.optimizer.loss_scaler.cur_scale == 4
    assert DeepSpeedStep.of(engine).history.attempted == 5
    (warning,) = caplog.messages
    assert "ranks read different numbers" in warning
    assert "On every rank the loss scale goes on at 4" in warning


ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=150)
@given(
    st.dictionaries(st.sampled_from([*DEEPSPEED_SCALER, "dynamic"]), ANYTHING),
    st.dictionaries(st.sampled_from([*HISTORY, "add", "last"]), ANYTHING) | ANYTHING,
)
def test_any_numbers_are_gone_on_with_or_warned_of(numbers: dict[str, Any], history: Any) -> None:
    logger = logging.getLogger(checkpoint.__name__)
    logger.disabled = True
    try:
        engine = load(saved(**numbers), {"fp16_patch": {"history": history}})
    finally:
        logger.disabled = False
    assert is_scale(engine.optimizer.loss_scaler.cur_scale)
    engine.optimizer.loss_scaler.update_scale(False)
    assert callable(DeepSpeedStep.of(engine).history.add)
