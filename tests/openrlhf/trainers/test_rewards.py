"""Advantages of a reward model's scores: a model in FP16 must not make what is computed from them less than FP32."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openrlhf")
torch = pytest.importorskip("torch")

import fp16_patch
from fp16_patch import Plan
from fp16_patch.patching.declarations import Patch, installed_release, patches_dir

pytestmark = pytest.mark.openrlhf

PATCH = Patch.from_toml(patches_dir() / "openrlhf" / "ppo-rewards.toml")
needs_it = pytest.mark.skipif(
    PATCH.exemption_in(installed_release("openrlhf")) is not None, reason="this release does it right"
)
GROUP = 4
# One prompt whose answers score alike, one with a spread.
SCORES = (0.5, 0.5, 0.5, 0.5, 0.25, 0.5, 0.5, 0.75)


@pytest.fixture
def advantages() -> Callable[[], Any]:
    """The advantage of each answer under group normalization, from a reward model's FP16 scores."""

    def computed() -> Any:
        makers = import_module("openrlhf.trainer.ppo_utils.experience_maker")
        advantage = SimpleNamespace(estimator="group_norm", gamma=1.0)
        # As the newest releases name them, and those up to 0.10.1.
        args = SimpleNamespace(
            algo=SimpleNamespace(advantage=advantage),
            rollout=SimpleNamespace(n_samples_per_prompt=GROUP),
            reward=SimpleNamespace(clip_range=None),
            advantage_estimator=advantage.estimator,
            gamma=advantage.gamma,
            n_samples_per_prompt=GROUP,
            reward_clip_range=None,
            overlong_buffer_len=None,
        )
        maker = object.__new__(makers.RemoteExperienceMaker)
        maker.strategy, maker.advantage_estimator = SimpleNamespace(args=args), advantage.estimator
        maker.args = args
        maker.kl_ctl = SimpleNamespace(value=0.0)
        experience = makers.Experience(
            index=list(range(len(SCORES))),
            rewards=torch.tensor(SCORES, dtype=torch.float16),
            kl=torch.zeros(len(SCORES), 1),
            action_mask=torch.ones(len(SCORES), 1, dtype=torch.long),
            info={"reward": torch.tensor(SCORES, dtype=torch.float16)},
        )
        return maker.compute_advantages_and_returns([experience])[0].advantages[:, 0]

    return computed


@needs_it
def test_stock_gives_nan_to_answers_that_score_alike(advantages: Callable[[], Any]) -> None:
    assert advantages()[:GROUP].isnan().all()


def test_answers_that_score_alike_have_no_advantage(advantages: Callable[[], Any]) -> None:
    fp16_patch.activate(Plan())
    computed = advantages()
    scores = torch.tensor(SCORES[GROUP:])
    assert computed[:GROUP].tolist() == [0.0] * GROUP
    assert torch.allclose(computed[GROUP:], (scores - scores.mean()) / scores.std())
