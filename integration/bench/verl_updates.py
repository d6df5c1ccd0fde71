"""Train verl's own FSDP engine on random tokens, one update at a time, in the process of a rank."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

SEQUENCES, TOKENS, MICRO_BATCH = 4, 16, 2


class Learner:
    """verl's own training worker, on random tokens.

    Args:
        model: a directory.
        updates: the steps of its learning-rate schedule.
        dropout: of the attention.
        tokens: of a sequence that `update` draws.
    """

    def __init__(self, model: Path, updates: int, *, dropout: float = 0.0, tokens: int = TOKENS) -> None:
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
        from verl.workers.config.engine import TrainingWorkerConfig
        from verl.workers.engine_workers import TrainingWorker

        self.worker = TrainingWorker(
            TrainingWorkerConfig(
                model_type="language_model",
                model_config=HFModelConfig(
                    path=str(model),
                    use_remove_padding=False,
                    enable_gradient_checkpointing=False,
                    override_config={"attn_implementation": "sdpa", "attention_dropout": dropout},
                ),
                engine_config=FSDPEngineConfig(
                    strategy="fsdp2",
                    use_torch_compile=False,
                    use_dynamic_bsz=False,
                    micro_batch_size_per_gpu=MICRO_BATCH,
                    infer_micro_batch_size_per_gpu=MICRO_BATCH,
                ),
                optimizer_config=FSDPOptimizerConfig(lr=1e-5, total_training_steps=updates),
                checkpoint_config=CheckpointConfig(),
            )
        )
        self.worker.reset()
        self.advantage, self.tokens = 1.0, tokens
        self.worker.set_loss_fn(self.loss)
        self.engine = self.worker.engine

    def start_at(self, scale: float) -> None:
        """Set the loss scale of the next update."""
        self.engine.scaler.load_state_dict({**self.engine.scaler.state_dict(), "scale": scale})

    def update(self, seed: int, advantage: float = 1.0) -> dict[str, float]:
        """Update on tokens drawn from the seed; returns what became of it."""
        import torch
        import torch.distributed as dist

        self.advantage = advantage
        generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        return self.train([torch.randint(2, 90, (self.tokens,), generator=generator) for _ in range(SEQUENCES)])

    def train(self, rows: list[Any], **more: list[Any]) -> dict[str, float]:
        """Update on these sequences' tokens, and more of each.

        Returns:
            `skipped`, 0 or 1, and `retries_total`; what the plan does not say is left out.
        """
        import torch
        from verl.utils import tensordict_utils as tu

        nested = {
            **more,
            "input_ids": rows,
            "position_ids": [torch.arange(len(row)) for row in rows],
            "loss_mask": [torch.ones(len(row), dtype=torch.int64) for row in rows],
        }
        tensors = {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in nested.items()}
        data = tu.get_tensordict(tensors, non_tensor_dict={"temperature": 1.0})
        tu.assign_non_tensor(data, update_lr_scheduler=True, global_token_num=[len(row) for row in rows])
        metrics = dict(tu.get(self.worker.train_batch(data), "metrics"))
        names = {"skipped": "fp16/step_skipped", "retries_total": "fp16/retries_total/max"}
        return {short: float(metrics[name][0][0]) for short, name in names.items() if name in metrics}

    def state(self) -> str:
        """Digest all ranks' parameters and moments."""
        import torch.distributed as dist

        own = hashlib.sha256()
        for parameter in self.engine.optimizer.param_groups[0]["params"]:
            for _, value in [("", parameter), *sorted(self.engine.optimizer.state[parameter].items())]:
                local = value.to_local() if hasattr(value, "to_local") else value
                own.update(local.detach().contiguous().numpy().tobytes())
        digests: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(digests, own.hexdigest())
        return " ".join(digests)

    def loss(self, model_output: dict[str, Any], data: Any, dp_group: Any) -> tuple[Any, dict[str, Any]]:
        return -model_output["log_probs"].values().float().mean() * self.advantage, {}
