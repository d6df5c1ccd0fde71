"""A mini-batch of an actor is a version of the policy, if its step was taken; one of a critic never is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")

from fp16_patch.runtime.weight_versions import WeightVersions
from fp16_patch.verl import mini_batch
from fp16_patch.verl.trainers import lags

pytestmark = pytest.mark.verl


class Engine:
    """Records no steps of its own; what became of one is planted."""

    engine_config = SimpleNamespace(forward_only=False, strategy="fsdp2")

    def __init__(self, kind: str = "language_model") -> None:
        self.model_config = SimpleNamespace(model_type=kind)

    def is_mp_src_rank_with_outputs(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("engine", "skipped", "lag"),
    [(Engine(), False, 1), (Engine(), None, 1), (Engine(), True, 0), (Engine("value_model"), False, 0)],
    ids=["taken", "no step on record", "skipped", "a critic's"],
)
def test_a_taken_step_of_the_actor_is_a_version(
    engine: Engine, skipped: bool | None, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensordict import TensorDict

    versions = WeightVersions()
    versions.synced(0)
    monkeypatch.setattr(lags, "versions", versions)
    last = None if skipped is None else SimpleNamespace(skipped=skipped)
    step: Any = SimpleNamespace(history=SimpleNamespace(last=last))
    monkeypatch.setattr(mini_batch, "step_of", lambda engine: step)
    data = TensorDict({}, batch_size=())
    mini_batch.train_batch(lambda data: {"metrics": {}}, engine, (data,), {})
    assert versions.lags() == {"0": lag}
