"""verl's own FSDP engine as the learner that scores sampled sequences, in a process of its own for each dtype.

The plan (`FP16_PATCH`) decides what it computes in, as it does in a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp16_patch.probe.sequences import Sampled
from integration.bench.ranks import PLAN, on_ranks

MICRO_BATCH = 8


@dataclass(frozen=True)
class LearnerModel:
    """What the engine loads.

    Attributes:
        path: the model, or the base of the adapters.
        adapter: a PEFT directory, whose adapters stay beside the weights, as they do in training.
        rank, alpha: of the adapters.
    """

    path: Path
    adapter: Path | None = None
    rank: int = 0
    alpha: int = 0


def scores(model: LearnerModel, sequences: Sequence[Sampled], dtype: str, strategy: str = "fsdp2") -> list[list[float]]:
    """Score each response's tokens, log π in nats, by verl's engine under a plan of mode `dtype`.

    Raises:
        RuntimeError: the engine ended without an answer; the end of its log.
    """
    request = {
        "model": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(model).items()},
        "strategy": strategy,
        "sequences": [[sequence.prompt, sequence.response] for sequence in sequences],
    }
    found: list[list[float]] = on_ranks(f"{__name__}:answer", request, {**PLAN, "FP16_PATCH": dtype})
    return found


def answer(request: dict[str, Any]) -> list[list[float]]:
    """Score the request's sequences in this process, which is a rank's."""
    import torch
    from verl.trainer.config import CheckpointConfig
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.config.engine import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    model, rank = request["model"], request["model"]["rank"]
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=model["path"],
                use_remove_padding=False,
                override_config={"attn_implementation": "sdpa"},
                lora_rank=rank,
                lora_alpha=model["alpha"],
                lora_adapter_path=model["adapter"],
            ),
            engine_config=FSDPEngineConfig(
                strategy=request["strategy"],
                use_torch_compile=False,
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=MICRO_BATCH,
                infer_micro_batch_size_per_gpu=MICRO_BATCH,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    # The engine takes whole micro-batches; what fills the last one is not read.
    asked = request["sequences"]
    filled = [*asked, *asked[:1] * (-len(asked) % MICRO_BATCH)]
    rows = [torch.tensor([*prompt, *response]) for prompt, response in filled]
    nested = {
        "input_ids": rows,
        "position_ids": [torch.arange(len(row)) for row in rows],
        "loss_mask": [torch.ones_like(row) for row in rows],
    }
    tensors = {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in nested.items()}
    data = tu.get_tensordict(tensors, non_tensor_dict={"temperature": 1.0})
    tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=False, use_remove_padding=False)
    tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=MICRO_BATCH)
    with worker.engine.eval_mode():
        scored = worker.engine.infer_batch(data)["model_output"]["log_probs"]
    # The engine's entry at a token is of the token after it.
    return [
        values[len(prompt) - 1 : len(prompt) + len(response) - 1].tolist()
        for values, (prompt, response) in zip(scored.unbind()[: len(asked)], asked, strict=True)
    ]
