"""When processes are asked, and what the first steps of unusual runs must not be refused for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.verl


def required(config: Any, updated: set[str], *, critic: bool = False) -> dict[str, tuple[str, ...]]:
    from fp16_patch.verl.trainers.driver import VerlDriver

    trainer = SimpleNamespace(config=config, use_critic=critic, use_reference_policy=False, ref_in_actor=False)
    return VerlDriver(trainer).required_quantities(updated)


def test_processes_are_asked_first_then_after_each_engines_first_update_then_now_and_then() -> None:
    from fp16_patch.runtime.preflight import PreflightCheck

    check, asked = PreflightCheck("verl"), []
    for step in range(1, 104):
        # The critic updates from step 1, the actor from step 4: a warm-up.
        for engine in ("critic", *(["actor"] if step >= 4 else [])):
            if check.due(step):
                check.run(step, [], {}, publish=lambda answers: None)
                asked.append((step, engine))
            check.updated.add(engine)
    assert asked == [(1, "critic"), (2, "critic"), (5, "critic"), (51, "critic"), (101, "critic")]


def test_an_engine_that_has_not_updated_owes_no_gradients(compose: Callable[..., Any]) -> None:
    warming_up = required(compose(), {"critic"}, critic=True)
    assert "gradient" in warming_up["critic"]
    assert "gradient" not in warming_up["actor"]
    assert "gradient" in required(compose(), {"actor"})["actor"]


def test_what_a_run_never_computes_is_not_asked_for(compose: Callable[..., Any]) -> None:
    bypass = compose("algorithm.rollout_correction.bypass_mode=True")
    assert "actor" not in required(bypass, set())
    assert "activation" not in required(compose("skip.rollout_tq.enable=True"), set())["rollout"]


def test_outcomes_lose_the_suffix_verl_aggregates_by() -> None:
    from fp16_patch.verl.trainers.driver import rename_outcomes

    metrics = {"actor/fp16/loss_scale/min": 8.0, "critic/fp16/skipped_total/max": 2.0, "actor/fp16/step_skipped": 0.5}
    rename_outcomes(metrics)
    assert metrics == {"fp16/loss_scale": 8.0, "fp16/critic/skipped_total": 2.0, "fp16/step_skipped": 0.5}


def test_pages_shared_with_other_state_are_judged_by_their_specification() -> None:
    import torch

    from fp16_patch.vllm.engine import _attention_cache_dtypes

    def runner(*specs: Any, cache: Any) -> Any:
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        return SimpleNamespace(kv_caches=[cache], kv_cache_config=SimpleNamespace(kv_cache_groups=groups))

    attention, state_space = SimpleNamespace(dtype=torch.float16), SimpleNamespace(dtypes=(torch.float32,))
    pages = torch.empty(1, dtype=torch.int8)
    assert _attention_cache_dtypes(runner(attention, state_space, cache=pages)) == {torch.float16}
    # With attention alone, what is allocated counts, not what was asked for.
    assert _attention_cache_dtypes(runner(attention, cache=torch.empty(1).bfloat16())) == {torch.bfloat16}
