"""What a server of SGLang does before it starts its schedulers, and how many of them it expects."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")

import fp16_patch
from fp16_patch import Plan, PlanError
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import ledger
from fp16_patch.sglang.sampler import CONVOLUTIONS

pytestmark = pytest.mark.verl

ALONE = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "nnodes": 1, "enable_dp_attention": False}


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the hook as verl does, with these arguments as SGLang has settled them; returns what went on to SGLang."""

    def start(plan: Plan, **settled: Any) -> list[Any]:
        fp16_patch.activate(plan)
        from fp16_patch.verl.samplers import server, sglang

        monkeypatch.setattr(server, "_actor_name", lambda: "sglang_server_reward_0_0")
        called: list[Any] = []

        def set_envs_and_config(server_args: Any) -> None:
            called.append(server_args)

        arguments = SimpleNamespace(**{**ALONE, "dtype": "float16", **settled})
        sglang.set_envs_and_config(set_envs_and_config, None, (arguments,), {})
        return called

    return start


@pytest.mark.parametrize(
    ("layout", "schedulers"),
    [
        ({}, 1),
        ({"tp_size": 4, "pp_size": 2}, 8),
        ({"tp_size": 2, "dp_size": 3}, 6),
        # Attention in data parallel: its replicas are ranks of the same group.
        ({"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, 4),
        ({"tp_size": 8, "nnodes": 2}, 4),
    ],
)
def test_a_scheduler_is_expected_for_each_rank_on_the_node(
    layout: dict[str, Any], schedulers: int, starts: Any
) -> None:
    assert len(starts(Plan(strict=False), **layout)) == 1
    assert propagation.expected_children() == {"sglang_scheduler": schedulers}
    assert ledger().kind == "sglang_server"


@pytest.mark.parametrize(
    ("settled", "named"),
    [
        # As for MistralLarge3, and for gpt-oss in MXFP4, whatever the framework asked for.
        ({"dtype": "bfloat16"}, "SGLang's dtype=bfloat16"),
        # As on a Blackwell GPU, for some experts.
        ({"moe_runner_backend": "flashinfer_trtllm"}, "SGLang's moe_runner_backend=flashinfer_trtllm"),
        ({"quantization": "mxfp4"}, "SGLang's quantization=mxfp4"),
    ],
)
def test_what_sglang_has_settled_on_is_refused_before_a_scheduler_starts(
    settled: dict[str, Any], named: str, starts: Any
) -> None:
    with pytest.raises(PlanError, match=named):
        starts(Plan(strict=False), **settled)
    assert propagation.expected_children() == {}


def test_recurrent_layers_are_told_the_plans_dtype(starts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONVOLUTIONS, raising=False)
    starts(Plan(strict=False))
    assert os.environ[CONVOLUTIONS] == "float16"


def test_observe_tells_them_nothing(starts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONVOLUTIONS, raising=False)
    starts(Plan(mode="observe"))
    assert CONVOLUTIONS not in os.environ


def test_observe_refuses_nothing(starts: Any) -> None:
    assert len(starts(Plan(mode="observe"), dtype="bfloat16")) == 1
