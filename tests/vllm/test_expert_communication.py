"""Ways of exchanging experts' tokens that know bfloat16 only."""

from __future__ import annotations

import pytest

from fp16_patch import Plan
from fp16_patch.patching.sources import Installed
from fp16_patch.vllm import expert_communication
from fp16_patch.vllm.expert_communication import (
    BF16_ONLY,
    VARIABLE,
    environment_conflicts,
    expert_communication_conflict,
)


@pytest.mark.parametrize("mode", ["fp16", "fp32"])
@pytest.mark.parametrize("backend", BF16_ONLY)
def test_one_that_knows_bfloat16_only_is_refused_with_its_key(backend: str, mode: str) -> None:
    message = str(expert_communication_conflict("all2all_backend", backend, Plan(mode=mode)))
    assert message.startswith(f"all2all_backend={backend}: its kernels")
    assert "Fix: use allgather_reducescatter" in message


@pytest.mark.parametrize("backend", [None, "allgather_reducescatter", "naive"])
def test_others_are_not(backend: object) -> None:
    assert expert_communication_conflict("all2all_backend", backend, Plan()) is None


def test_in_bfloat16_all_may_be_used() -> None:
    assert expert_communication_conflict("all2all_backend", BF16_ONLY[0], Plan(mode="bf16")) is None


@pytest.mark.parametrize("reads", [True, False])
def test_a_variable_counts_where_the_installed_vllm_reads_it(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    class Vllm:
        def read(self, module: str) -> str | None:
            return f'"{VARIABLE}": …' if reads and module == "vllm.envs" else None

    monkeypatch.setenv(VARIABLE, "deepep_low_latency")
    found = [str(conflict) for conflict in environment_conflicts(Plan(), Vllm())]
    assert len(found) == reads
    assert all(message.startswith(f"{VARIABLE}=deepep_low_latency: ") for message in found)


@pytest.mark.vllm
def test_the_installed_vllm_knows_the_names() -> None:
    pytest.importorskip("vllm")
    known = Installed().read("vllm.config.parallel") or ""
    assert [backend for backend in expert_communication.BF16_ONLY if f'"{backend}"' in known]
    assert '"allgather_reducescatter"' in known
