"""DeepSpeed's configuration as the plan completes it, of what OpenRLHF makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import fp16_patch
from fp16_patch import Plan


def configured(mode: str, **zero: Any) -> dict[str, Any]:
    fp16_patch.activate(Plan(mode=mode))
    from fp16_patch.openrlhf.deepspeed.strategy import train_config

    made = {"zero_optimization": {"stage": 2, **zero}, "fp16": {"enabled": True}}
    return train_config(lambda: made, SimpleNamespace(), (), {})


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_gradients_reduced_in_float32_come_in_buckets_that_take_no_more_memory(mode: str) -> None:
    from fp16_patch.openrlhf.deepspeed.strategy import REDUCE_BUCKET

    config = configured(mode, reduce_bucket_size="auto")
    assert config["communication_data_type"] == "fp32"
    assert config["zero_optimization"]["reduce_bucket_size"] == REDUCE_BUCKET
    # Bytes of a bucket in 16 bits and of its copies in FP32, against what DeepSpeed's takes: one more copy in 16 bits.
    assert (2 + 4 + 4) * REDUCE_BUCKET <= (2 + 2) * 500_000_000


def test_a_bucket_that_somebody_chose_stays() -> None:
    assert configured("fp16", reduce_bucket_size=1000)["zero_optimization"]["reduce_bucket_size"] == 1000


def test_observe_changes_nothing() -> None:
    config = configured("observe", reduce_bucket_size="auto")
    assert config["zero_optimization"]["reduce_bucket_size"] == "auto"
    assert "communication_data_type" not in config
