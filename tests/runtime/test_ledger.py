from __future__ import annotations

import pytest

from fp16_patch.plan.plan import Plan
from fp16_patch.runtime.ledger import Ledger, digests, judge, merged, missing_record

FP16 = Plan()
GOOD = {
    "actor": {"autocast": "float16", "activation": "float16", "log_prob": "float32", "gradient": "float32"},
    "rollout": {"engine_weight": "float16", "kv_cache": "float16", "wire": "float32"},
}


def record(kind: str = "worker", plan: Plan = FP16, **changed: str) -> dict:
    ledger = Ledger(kind=kind)
    for role, row in GOOD.items():
        for quantity, dtype in row.items():
            ledger.note(role, quantity, changed.get(f"{role}_{quantity}", dtype))
    return ledger.record(plan, {})


def test_a_uniform_job_has_no_findings() -> None:
    assert judge([record(), record("server")], FP16, {"actor": ("autocast",)}) == []


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        ("actor_autocast", "bfloat16"),
        ("actor_activation", "float32"),
        ("actor_log_prob", "float16"),
        ("actor_gradient", "float16"),
        ("rollout_engine_weight", "bfloat16"),
        ("rollout_kv_cache", "bfloat16"),
        ("rollout_kv_cache", "uint8"),
        ("rollout_wire", "bfloat16"),
    ],
)
def test_one_wrong_dtype_in_one_process_is_found(where: str, dtype: str) -> None:
    odd = record(**{where: dtype})
    (finding,) = judge([record(), odd, record()], FP16, {})
    role, _, quantity = where.partition("_")
    assert (finding.role, finding.quantity, finding.pid) == (role, quantity, odd["pid"])
    assert dtype in finding.seen


def test_a_second_dtype_beside_the_right_one_is_found() -> None:
    ledger = Ledger()
    ledger.note("actor", "autocast", "torch.float16")
    assert ledger.note("actor", "autocast", "torch.bfloat16")
    assert not ledger.note("actor", "autocast", "torch.bfloat16")
    (finding,) = judge([ledger.record(FP16, {})], FP16, {})
    assert finding.seen == "bfloat16, float16"


def test_a_process_without_attestation_is_found() -> None:
    (finding,) = judge([record(), missing_record("sampler_worker", "no attestation")], FP16, {})
    assert (finding.role, finding.quantity, finding.seen) == ("sampler_worker", "attestation", "no attestation")


def test_a_process_without_a_patch_it_owes_is_found() -> None:
    ledger = Ledger(kind="worker")
    records = [ledger.record(FP16, {"fsdp-scaler": state}) for state in ("applied", "waiting")]
    (finding,) = judge(records, FP16, {}, lambda kind: ["fsdp-scaler"] if kind == "worker" else [])
    assert finding.seen == "patches not live: fsdp-scaler"


def test_a_quantity_noted_without_a_dtype_is_unseen() -> None:
    ledger = Ledger()
    assert not ledger.note("rollout", "kv_cache")
    (finding,) = judge([ledger.record(FP16, {})], FP16, {"rollout": ("kv_cache",)})
    assert finding.seen == "never seen"


def test_a_process_under_another_plan_is_found() -> None:
    findings = judge([record(plan=Plan(mode="observe"))], FP16, {})
    assert [finding.quantity for finding in findings] == ["attestation"]


def test_what_nobody_has_seen_is_found() -> None:
    (finding,) = judge([record()], FP16, {"critic": ("autocast",)})
    assert (finding.role, finding.quantity, finding.seen) == ("critic", "autocast", "never seen")


def test_merged_holds_all_processes() -> None:
    together = merged([record(), record(actor_autocast="bfloat16")])
    assert together["actor"]["autocast"] == ["bfloat16", "float16"]


def sampler(pid: int, digest: str, synced: int | None = 3, rank: str = "0") -> dict:
    return {**record("sampler_worker"), "pid": pid, "synced": synced, "held": {"rank": rank, "digest": digest}}


def test_samplers_that_hold_the_same_weights_have_no_findings() -> None:
    alike = [sampler(1, "a"), sampler(2, "a"), sampler(3, "b", rank="1"), sampler(4, "b", rank="1")]
    asleep = sampler(5, "c", synced=1)  # a replica that has not been woken since
    assert judge([*alike, asleep], FP16, {}) == []


def test_the_one_sampler_with_other_weights_is_named() -> None:
    (finding,) = judge([sampler(1, "a"), sampler(2, "b"), sampler(3, "a")], FP16, {})
    assert (finding.pid, finding.role, finding.quantity) == (2, "actor", "weights")
    assert "than 2 other samplers got by sync 3" in finding.seen


def test_of_two_the_one_is_named_that_holds_what_it_held_before() -> None:
    before = digests([sampler(1, "old"), sampler(2, "old")])
    (finding,) = judge([sampler(1, "new"), sampler(2, "old")], FP16, {}, held_before=before)
    assert finding.pid == 2
    assert "than the other sampler got by sync 3" in finding.seen


def test_of_two_that_cannot_be_told_apart_both_are_named() -> None:
    findings = judge([sampler(1, "a"), sampler(2, "b")], FP16, {})
    assert [finding.pid for finding in findings] == [1, 2]


def test_where_as_many_hold_the_one_as_the_other_all_are_named() -> None:
    findings = judge([sampler(1, "a"), sampler(2, "b"), sampler(3, "a"), sampler(4, "b")], FP16, {})
    assert [finding.pid for finding in findings] == [1, 2, 3, 4]


def test_without_a_sync_there_is_nothing_to_compare() -> None:
    assert judge([sampler(1, "a", synced=None), sampler(2, "b", synced=None)], FP16, {}) == []
