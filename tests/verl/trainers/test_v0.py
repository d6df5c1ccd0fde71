"""verl's V0 trainer, the real class without Ray: what its hooks check, order and record."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")
torch = pytest.importorskip("torch")

from fp16_patch.mismatch.statistics.summary import MismatchStats
from fp16_patch.plan.errors import PlanError, PrecisionError
from fp16_patch.runtime.activation import ledger
from tests.installed_release import sits_in

pytestmark = pytest.mark.verl

# Two sequences as V0 has them: prompts padded on the left, responses on the right.
PROMPTS, RESPONSES = (2, 3), (4, 2)
STEP = {"perf/throughput": 3.0, "actor/fp16/loss_scale/min": 8.0}


@pytest.fixture
def made(activated: Callable[..., Any], compose: Callable[..., Any]) -> Any:
    """A V0 trainer under a plan, as far as it gets without Ray."""
    activated()
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer = object.__new__(RayPPOTrainer)
    trainer.config = compose("data.train_batch_size=1", "data.dataloader_num_workers=0")
    trainer.global_steps = 1
    trainer.use_critic = trainer.use_reference_policy = trainer.ref_in_actor = False
    trainer.use_legacy_worker_impl = "disable"
    return trainer


@pytest.fixture
def monitor(made: Any) -> Any:
    """What the monitor of the trainer's run is told."""
    from fp16_patch.verl.trainers.v0 import VerlV0Driver

    told = SimpleNamespace(expected=[], steps=[], measures=True, order=("run", 7, False))
    told.expect = told.expected.append
    told.end_step = lambda step, metrics: told.steps.append((step, dict(metrics)))
    VerlV0Driver.of(made).monitor = told
    return told


@pytest.fixture
def batch() -> Any:
    from verl import DataProto

    width, length = max(PROMPTS), max(RESPONSES)
    torch.manual_seed(0)
    prompt = torch.tensor([[0] * (width - here) + [1] * here for here in PROMPTS])
    response = torch.tensor([[1] * here + [0] * (length - here) for here in RESPONSES])
    attention = torch.cat([prompt, response], dim=1)
    return DataProto.from_single_dict(
        {
            "prompts": prompt,
            "responses": torch.arange(2 * length).reshape(2, length),
            "input_ids": torch.arange(2 * (width + length)).reshape(2, width + length),
            "attention_mask": attention,
            "position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0),
            "response_mask": response,
            "rollout_log_probs": -torch.rand(2, length),
        }
    )


class Engine:
    """An actor's engine on the only rank."""

    model_config = SimpleNamespace(model_type="language_model")
    engine_config = SimpleNamespace(forward_only=False)

    def infer(self, data: Any, loss_function: Any = None) -> dict[str, Any]:
        rows = [-row.float() / 10 for row in data["input_ids"].unbind()]
        return {"model_output": {"log_probs": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}}

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_size(self) -> int:
        return 1


class Workers:
    """A worker group whose workers' ranks are one engine here."""

    def __init__(self) -> None:
        self.workers: list[Any] = []
        self.called: list[str] = []
        self.data: Any = None

    def compute_log_prob(self, data: Any) -> Any:
        from verl.utils import tensordict_utils

        from fp16_patch.verl.trainers import observation

        self.data = data
        engine = Engine()
        log_probs = observation.infer_batch(engine.infer, engine, (data,), {})["model_output"]["log_probs"]
        return tensordict_utils.get_tensordict(
            {"entropy": log_probs, "log_probs": log_probs}, non_tensor_dict={"metrics": {"mfu": 0.0}}
        )

    def update_actor(self, data: Any) -> Any:
        self.called.append("update_actor")


class Unanswering:
    """The handle of an actor that is gone."""

    _actor_id = "gone"

    @property
    def __ray_call__(self) -> Any:
        raise RuntimeError("the actor died")


def test_the_plan_meets_the_configuration_before_workers_start(made: Any) -> None:
    made._create_dataloader([{"x": torch.ones(1)}], [{"x": torch.ones(1)}], None, None)
    assert ledger().kind == "task_runner_v0"
    assert made.config.actor_rollout_ref.rollout.dtype == "float16"


def test_a_process_that_was_reached_too_late_does_not_train(made: Any) -> None:
    with pytest.raises(PlanError, match="fp16-patch run --"):
        made.fit()


@sits_in("trainer-v0-observation", "RayPPOTrainer._compute_old_log_prob")
def test_the_order_reaches_the_ranks_and_the_sampled_tokens_are_observed(
    made: Any, monitor: Any, batch: Any, reports: list[Any]
) -> None:
    from fp16_patch.verl.trainers import observation

    made.actor_rollout_wg = Workers()
    learner = made._compute_old_log_prob(batch)[0].batch["old_log_probs"]
    ((who, number, stats, floor, by_lag),) = reports
    assert (who, number, floor, by_lag) == (("run", 0, 1), 7, None, {})
    expected = MismatchStats.from_log_probs(batch.batch["rollout_log_probs"], learner, batch.batch["response_mask"])
    assert stats.tokens == sum(RESPONSES)
    assert stats.d_abs_sum == pytest.approx(expected.d_abs_sum)
    assert observation.ORDER not in batch.meta_info
    assert observation.ORDER not in made.actor_rollout_wg.data.keys()  # noqa: SIM118, a TensorDict iterates over rows


@sits_in("trainer-v0-update-actor", "RayPPOTrainer._update_actor")
def test_no_update_before_every_process_answers(made: Any, monitor: Any, batch: Any) -> None:
    made.actor_rollout_wg = Workers()
    made.actor_rollout_wg.workers = [Unanswering()]
    monitor.write = lambda name, document: None
    with pytest.raises(PrecisionError, match="the actor died"):
        made._update_actor(batch)
    assert made.actor_rollout_wg.called == []


def test_workers_that_fit_calls_itself_are_held_back_and_ordered_too(made: Any, monitor: Any, batch: Any) -> None:
    from fp16_patch.verl.trainers import observation, v0

    ordered = []

    class CalledByFit(Workers):
        def compute_log_prob(self, data: Any) -> None:
            ordered.append(data.meta_info[observation.ORDER])

    made.actor_rollout_wg = workers = CalledByFit()
    workers.workers = [Unanswering()]
    monitor.write = lambda name, document: None
    for hook in (v0.actor_workers, v0.critic_workers, v0.observing_workers):
        hook(lambda: None, made, (), {})
    workers.compute_log_prob(batch)
    assert ordered == [json.dumps(["run", 7, False, 1, False, False])]
    assert monitor.expected == [sum(RESPONSES)]
    assert observation.ORDER not in batch.meta_info
    with pytest.raises(PrecisionError):
        workers.update_actor(batch)
    assert workers.called == []


@pytest.mark.parametrize(
    "held",
    [
        {"llm_server_manager": "replicas"},
        {"async_rollout_manager": "replicas"},
        {"async_rollout_manager": "servers"},
        {"async_rollout_manager": "rewards"},
        {"reward_loop_manager": "rewards"},
    ],
    ids=str,
)
def test_samplers_are_found_wherever_a_release_keeps_them(made: Any, held: dict[str, str]) -> None:
    from fp16_patch.verl.trainers.v0 import VerlV0Driver

    server = SimpleNamespace(_actor_id="server")
    replicas = SimpleNamespace(rollout_replicas=[SimpleNamespace(servers=[server])])
    managers = {
        "replicas": replicas,
        "servers": SimpleNamespace(async_llm_servers=[server]),
        "rewards": SimpleNamespace(reward_model_manager=replicas),
    }
    made.actor_rollout_wg = Workers()
    for name, kind in held.items():
        setattr(made, name, managers[kind])
    assert VerlV0Driver.of(made).actors() == [("server", server)]


def test_a_logged_step_is_recorded_with_verls_metrics(made: Any, monitor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.utils.tracking import Tracking

    from fp16_patch.runtime import driver
    from fp16_patch.verl.trainers.driver import VerlDriver
    from fp16_patch.verl.trainers.v0 import VerlV0Driver

    logged: list[dict[str, Any]] = []
    tracking = object.__new__(Tracking)
    tracking.logger = {"console": SimpleNamespace(log=lambda data, step: logged.append(data), finish=lambda *_: None)}
    # PPOTrainer, which records its steps itself, logs.
    monkeypatch.setattr(driver, "_running", VerlDriver(made))
    tracking.log(data=dict(STEP), step=3)
    assert logged == [STEP]
    monkeypatch.setattr(driver, "_running", VerlV0Driver.of(made))
    tracking.log(data={"val-core/reward": 1.0}, step=0)
    assert monitor.steps == []
    tracking.log(data=dict(STEP), step=1)
    assert monitor.steps == [(1, {"perf/throughput": 3.0, "fp16/loss_scale": 8.0})]
    assert logged[-1]["fp16/loss_scale"] == 8.0
