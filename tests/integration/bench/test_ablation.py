"""Learner and sampler apart: refused by the ledger, and proved by it where the bench's module says what is wanted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("pandas")
OmegaConf = pytest.importorskip("omegaconf").OmegaConf

from fp16_patch.plan.errors import PrecisionFinding
from fp16_patch.plan.plan import Plan
from fp16_patch.runtime import ledger
from fp16_patch.runtime.ledger import Ledger, judge
from integration.bench import ablation

FP16, OBSERVE = Plan(), Plan(mode="observe")
LEARNER = {"autocast": "float16", "parameter": "float16", "activation": "float16", "gradient": "float32"}
SAMPLER = ("engine_weight", "kv_cache", "activation")


def pair(sampler: str) -> list[dict[str, Any]]:
    """A learner's record in fp16 and a sampler's."""
    worker, engine = Ledger(kind="worker"), Ledger(kind="sampler_worker")
    for quantity, dtype in LEARNER.items():
        worker.note("actor", quantity, dtype)
    for quantity in SAMPLER:
        engine.note("rollout", quantity, sampler)
    engine.note("rollout", "wire", "float32")
    return [worker.record(FP16, {}), engine.record(FP16, {})]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The bench's module for a sampler in bf16; not installed yet."""
    path = ablation.PLANTS / "sampler_apart.py"
    spec = importlib.util.spec_from_file_location("sampler_apart", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.delenv("BENCH_SAMPLER", raising=False)
    spec.loader.exec_module(module)
    monkeypatch.setenv(module.SAMPLER_ENV, "bf16")
    return module


@pytest.fixture
def judged_apart(apart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[PrecisionFinding]]:
    monkeypatch.setattr(ledger, "judge", ledger.judge)
    apart.judge_apart(ledger)
    return lambda records, required={}: ledger.judge(records, FP16, required)


def test_without_the_module_the_pair_is_refused() -> None:
    found = judge(pair("bfloat16"), FP16, {})
    assert {(finding.role, finding.quantity) for finding in found} == {("rollout", quantity) for quantity in SAMPLER}


def test_with_it_the_pair_is_proved(judged_apart: Callable[..., list[PrecisionFinding]]) -> None:
    assert judged_apart(pair("bfloat16")) == []


@pytest.mark.parametrize("sampler", ["float16", "float32"])
def test_with_it_a_sampler_in_another_dtype_is_refused(
    judged_apart: Callable[..., list[PrecisionFinding]], sampler: str
) -> None:
    found = judged_apart(pair(sampler))
    # Weights may be kept in fp32 by any engine.
    quantities = {"kv_cache", "activation"} | ({"engine_weight"} if sampler == "float16" else set())
    assert {(finding.role, finding.quantity) for finding in found} == {("rollout", quantity) for quantity in quantities}
    assert all("bfloat16" in finding.wanted for finding in found)


def test_with_it_the_learner_is_judged_as_ever(judged_apart: Callable[..., list[PrecisionFinding]]) -> None:
    worker, engine = pair("bfloat16")
    worker["roles"]["actor"]["autocast"] = ["bfloat16"]
    (finding,) = judged_apart([worker, engine])
    assert (finding.role, finding.quantity, finding.wanted) == ("actor", "autocast", "float16")


def test_with_it_the_sampler_must_have_been_seen_as_ever(judged_apart: Callable[..., list[PrecisionFinding]]) -> None:
    (finding,) = judged_apart(pair("bfloat16"), {"rollout": ("kv_cache", "log_prob")})
    assert (finding.role, finding.quantity, finding.seen) == ("rollout", "log_prob", "never seen")


def test_with_it_a_process_attests_to_the_plan_of_the_run_as_ever(
    judged_apart: Callable[..., list[PrecisionFinding]],
) -> None:
    worker, engine = pair("bfloat16")
    (finding,) = judged_apart([worker, {**engine, "mode": "bf16"}])
    assert (finding.quantity, finding.wanted) == ("attestation", "live, mode fp16")


@pytest.mark.parametrize(("plan", "dtype"), [(FP16, "bfloat16"), (OBSERVE, "as configured")])
def test_it_starts_the_sampler_in_the_other_dtype(apart: ModuleType, plan: Plan, dtype: str) -> None:
    settings = SimpleNamespace(
        rollout_config=lambda wrapped, rollout, args, kwargs: None,
        apply_to=lambda config, plan: (
            config.update({"actor": plan.dtype, "actor_rollout_ref": {"rollout": {"dtype": plan.dtype}}}) or ["actor"]
        ),
        force=lambda rollout, dtype: setattr(rollout, "dtype", dtype),
        current_plan=lambda: plan,
    )
    apart.start_apart(settings)
    rollout = SimpleNamespace(dtype="as configured")
    settings.rollout_config(None, rollout, (), {})
    assert rollout.dtype == dtype
    if plan.overrides_dtype:
        config = OmegaConf.create({})
        assert settings.apply_to(config, plan) == ["actor"]
        assert config == {"actor": "float16", "actor_rollout_ref": {"rollout": {"dtype": "bfloat16"}}}


def test_the_environment_names_both_modes() -> None:
    training = ablation.training_of("fp16/bf16", 3)
    assert (training.env["FP16_PATCH"], training.env["BENCH_SAMPLER"], training.seed) == ("fp16", "bf16", 3)
    assert (ablation.PLANTS / f"{training.env['VERL_USE_EXTERNAL_MODULES'].split(',')[1]}.py").is_file()


def test_the_ledger_of_a_run_is_compared_with_the_pair() -> None:
    seen = {"actor": {"autocast": ["float16"], "gradient": ["float32"]}, "rollout": {"kv_cache": ["bfloat16"]}}
    assert ablation.proved(seen) == ablation.wanted("fp16/bf16")
    assert ablation.proved(seen) != ablation.wanted("fp16/fp16")
    assert ablation.proved({}) == {"actor": [], "rollout": []}
