"""What notes dtypes in a forward pass ends no forward pass of a run that only observes."""

from __future__ import annotations

import traceback

import pytest

torch = pytest.importorskip("torch")

from fp16_patch import Plan
from fp16_patch.runtime.activation import activate, ledger
from fp16_patch.runtime.compute_dtypes import watch_linear


@pytest.mark.parametrize("mode", ["observe", "fp16"])
def test_a_layer_of_another_kind_goes_on_where_the_plan_observes(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    activate(Plan(mode=mode, strict=False))
    linear, other = torch.nn.Linear(2, 2), torch.nn.Identity()  # which has no weight
    watch_linear(linear, "actor")
    watch_linear(other, "actor")
    batch = torch.ones(1, 2)
    assert linear(batch).shape == (1, 2)
    assert ledger().roles["actor"]["activation"] == ["float32"]
    if mode == "observe":
        assert other(batch) is batch
        assert "fp16_patch failed in what notes the dtypes of a layer" in capsys.readouterr().err
    else:
        with pytest.raises(AttributeError) as failed:
            other(batch)
        assert "in what notes the dtypes of a layer, and not" in "".join(traceback.format_exception(failed.value))
