"""verl edited by our diff, from its own command line: FP16 in every role, and the mismatch that the patches give."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.verl, pytest.mark.e2e]
pytest.importorskip("verl")
pytest.importorskip("vllm")

from fp16_patch.mismatch.record.reading import load_run
from integration.cpu.launch import RunResult
from tests.e2e.verl_runs import finished, ledger, record
from tests.edited import edited_copy


@pytest.fixture(scope="module")
def edited(start_verl: Callable[..., RunResult], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Observed, which changes nothing, as nothing else tells dtypes; the edited code is none that the patches know."""
    tree = tmp_path_factory.mktemp("fork")
    edited_copy(("verl",), tree)
    env = {"FP16_PATCH_STRICT": "0", "PYTHONPATH": str(tree)}
    return finished(start_verl("bf16", env=env, use_ref=True))


def test_every_role_computes_in_float16(edited: RunResult) -> None:
    found = ledger(edited)
    assert {process["mode"] for process in found["processes"]} == {"observe"}
    roles = found["roles"]
    assert set(roles) == {"actor", "ref", "rollout"}
    for role in ("actor", "ref"):
        assert roles[role]["autocast"] == roles[role]["parameter"] == roles[role]["activation"] == ["float16"]
        assert roles[role]["log_prob"] == ["float32"]
    assert roles["actor"]["gradient"] == roles["actor"]["master"] == ["float32"]
    assert roles["rollout"] == {
        "engine_weight": ["float16"],
        "kv_cache": ["float16"],
        "activation": ["float16"],
        "wire": ["float32"],
        # torch's switches are no part of verl's tree.
        "gemm_sum": ["float16"],
    }


def test_the_mismatch_is_that_of_float16(edited: RunResult) -> None:
    assert 5e-4 < load_run(record(edited)).summary()["mismatch"]["mean_abs"] < 1.2e-3
