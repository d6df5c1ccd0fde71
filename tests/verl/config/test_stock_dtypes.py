"""What verl's learners compute in without a plan: the declared table, and the code of the installed release."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest

from fp16_patch.patching.declarations import installed_release
from fp16_patch.patching.fingerprint import parsed
from fp16_patch.patching.sources import Installed
from fp16_patch.verl.config.stock_dtypes import Row, learner_dtype, rows

ACTOR, REF, CRITIC = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic"
ENGINE = {"trainer.use_legacy_worker_impl": "disable"}
BOTH = {"s.dtype": "fp16", "s.mixed_precision.param_dtype": "fp32"}


@pytest.mark.parametrize(
    ("release", "role", "strategy", "settings", "computed"),
    [
        # FSDP rounds the weights to it, and autocast to bfloat16 after that.
        ("0.5.0", "actor", "fsdp", {"s.mixed_precision.param_dtype": "fp16"}, "bfloat16"),
        ("0.6.0", "ref", "fsdp2", {"s.mixed_precision.param_dtype": "float16"}, "bfloat16"),
        *((release, "actor", "fsdp", BOTH, "float16") for release in ("0.6.1", "0.7.0", "0.7.1")),
        *((release, "ref", "fsdp2", BOTH, "float16") for release in ("0.6.1", "0.7.0", "0.7.1")),
        *((release, "critic", "fsdp", BOTH, "bfloat16") for release in ("0.5.0", "0.6.1", "0.7.1")),
        *((release, "reward", "fsdp", BOTH, "bfloat16") for release in ("0.5.0", "0.6.1", "0.7.0")),
        *((release, "actor", "fsdp", {**BOTH, **ENGINE}, "bfloat16") for release in ("0.7.0", "0.7.1")),
        # Its engine is the critic's only.
        ("0.6.1", "actor", "fsdp", {**BOTH, **ENGINE}, "float16"),
        *((release, "actor", "fsdp", BOTH, "float32") for release in ("0.8.0", "0.9.0", "0.9.1", "0.10.0.dev0")),
        *((release, "critic", "fsdp2", {"s.dtype": "fp16"}, "bfloat16") for release in ("0.8.0", "0.9.1")),
        *((release, "actor", "megatron", {"s.dtype": "float16"}, "bfloat16") for release in ("0.5.0", "0.6.0")),
        *(
            (release, "critic", "megatron", {"s.dtype": "float16"}, "float16")
            for release in ("0.6.1", "0.8.0", "0.9.1")
        ),
        *((release, "ref", "megatron", {"s.dtype": "float16"}, "bfloat16") for release in ("0.6.1", "0.7.1")),
        ("0.7.1", "ref", "megatron", {f"{ACTOR}.megatron.dtype": "float16"}, "float16"),
        ("0.7.1", "ref", "megatron", {"s.dtype": "float16", **ENGINE}, "float16"),
        ("0.9.1", "ref", "megatron", {"s.dtype": "float16"}, "float16"),
        ("0.9.1", "actor", "veomni", BOTH, "bfloat16"),
    ],
)
def test_a_role_computes_in_what_its_release_reads(
    release: str, role: str, strategy: str, settings: dict[str, str], computed: str
) -> None:
    assert learner_dtype(settings.get, role, strategy, "s", release) == computed


def test_what_is_not_set_is_bfloat16() -> None:
    for row in rows():
        assert learner_dtype({}.get, (*row.roles, "actor")[0], row.engines[0], "s", "0.9.1") == "bfloat16"


@pytest.mark.verl
@pytest.mark.parametrize("row", [row for row in rows() if row.where], ids=lambda row: f"{row.releases} {row.where}")
def test_the_installed_release_reads_what_is_declared(row: Row) -> None:
    if not row.holds(installed_release("verl")):
        pytest.skip("declared for other releases")
    module, _, name = str(row.where).partition(":")
    function = parsed(Installed().read(module) or "", name)
    assert function is not None
    if row.reads is None:
        assert autocasts(function) == {"torch.bfloat16"}
    else:
        text = ast.unparse(function)
        assert all(part in text for part in row.reads.split("."))
        assert not autocasts(function)


def autocasts(function: ast.AST) -> set[str]:
    """The dtypes that a function hands to autocast."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and "autocast" in ast.unparse(node.func)]
    return {ast.unparse(keyword.value) for call in calls for keyword in call.keywords if keyword.arg == "dtype"}


@pytest.mark.verl
def test_roles_without_a_plan_are_those_of_the_installed_release(compose: Callable[..., Any]) -> None:
    from fp16_patch import Plan
    from fp16_patch.verl.config.settings import effective_dtypes

    key = f"+{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp16"
    reads_it = learner_dtype({"s.mixed_precision.param_dtype": "fp16"}.get, "actor", "fsdp", "s") == "float16"
    config = compose("algorithm.adv_estimator=gae", f"{ACTOR}.use_kl_loss=True", key)
    roles = effective_dtypes(config, Plan(mode="observe"))
    assert roles == {
        "actor": "float16" if reads_it else "bfloat16",
        **dict.fromkeys(("ref", "critic", "rollout"), "bfloat16"),
    }
