"""Mini-batches lost to overflows by verl's own FSDP engine: dropped as its scaler does, and tried again.

    python -m integration.bench.retry

The same 200 updates of one model on the same tokens, ten of which have advantages 16 times as large, so that their
gradients overflow at the scale that the others bear. Before each of the ten the scale is put back to that level, where
growing would have taken it in a longer run. And whether a step tried again is, to the last bit, the step of a run that
started at its scale.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from integration.bench.verl_learner import ROOT
from integration.cpu.launch import ENVIRONMENT
from integration.cpu.tiny_model import make_random_model

MODULE = "integration.bench.retry"
UPDATES, PLANTED = 200, range(15, 200, 20)
SEQUENCES, TOKENS, MICRO_BATCH = 4, 16, 2
# Makes the gradients of the random model overflow at 65536, and those of a planted update four halvings below.
ADVANTAGE, HUGE, DROPOUT = 16.0, 16.0, 0.2
SKIPS = {"FP16_PATCH_ON_OVERFLOW": "skip", "FP16_PATCH_INIT_SCALE": "65536"}
RETRIES = {"FP16_PATCH_INIT_SCALE": "65536"}


def measure(out: Path, seed: int) -> dict[str, Any]:
    """`lost_*`: mini-batches of 200 that nobody trained on after the first step; `calibration_skips_*`: before it.

    `stock` drops a mini-batch and starts at torch's 65536, as verl's own scaler does; `ours` are the defaults.
    """
    model = make_random_model(out / "model")
    whole = {"updates": UPDATES, "planted": list(PLANTED), "model": str(model), "seed": seed}
    stock, ours = ran(MODULE, whole, SKIPS, 1), ran(MODULE, whole, {}, 1)
    return {
        "updates": UPDATES,
        "planted": len(PLANTED),
        "lost_stock": stock["lost"],
        "lost_ours": ours["lost"],
        "retries_ours": ours["retries"],
        "calibration_skips_stock": stock["calibration_skips"],
        "calibration_skips_ours": ours["calibration_skips"],
        "calibration_retries_ours": ours["calibration_retries"],
        "first_scale_ours": ours["scales"][0],
        "retry_bitwise": all(_is_bitwise(whole, ranks) for ranks in (1, 2)),
    }


def _is_bitwise(whole: dict[str, Any], ranks: int) -> bool:
    """Whether retries leave no trace: six updates from 65536, two of them planted, beside the same without a retry."""
    short = {**whole, "updates": 6, "planted": [2, 4]}
    found = ran(MODULE, short, RETRIES, ranks)
    clean = ran(MODULE, {**short, "scales": found["scales"]}, RETRIES, ranks)
    if not found["retries"] or clean["retries"] or found["lost"] or found["calibration_skips"]:
        raise RuntimeError(f"nothing to compare on {ranks} ranks: {found}, {clean}")
    return bool(found["state"] == clean["state"])


def ran(module: str, request: dict[str, Any], settings: dict[str, str], ranks: int) -> dict[str, Any]:
    """What the `answer` of a module of this folder gives, on so many ranks under a plan with these settings."""
    with tempfile.TemporaryDirectory(prefix="fp16_patch_bench_") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", module]
        command = [sys.executable, "-m", *launch, "--answer", str(asked), str(answered)]
        process = subprocess.run(command, env=_environment(settings), capture_output=True, text=True, check=False)
        if process.returncode or not answered.is_file():
            raise RuntimeError(f"verl's engine on {ranks} ranks:\n{process.stderr[-3000:]}")
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return answer


def _environment(settings: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "integration" / "cpu"), str(ROOT)])
    plan = {"FP16_PATCH": "fp16", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,fp16_patch.autoload", **settings}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    return {**kept, **ENVIRONMENT, **plan, "PYTHONPATH": path}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """In a rank's process: what became of each update.

    Args:
        request: with `scales`, each update starts at its own; without, at the scale of the former.
    """
    import torch
    import torch.distributed as dist

    learner = Learner(Path(request["model"]), UPDATES)
    torch.manual_seed(request["seed"] + dist.get_rank())
    scales, metrics = [], []
    level = None
    for number in range(request["updates"]):
        planted = number in request["planted"]
        if "scales" in request:
            learner.start_at(request["scales"][number])
        elif planted and level is not None:
            learner.start_at(level)
        huge = planted and dist.get_rank() == dist.get_world_size() - 1
        metrics.append(learner.update(request["seed"] + number, ADVANTAGE * (HUGE if huge else 1.0)))
        scales.append(float(learner.engine.scaler.get_scale()))
        level = scales[-1] if level is None and not metrics[-1]["skipped"] else level
    skipped = [bool(step["skipped"]) for step in metrics]
    first = skipped.index(False)
    return {
        "lost": sum(skipped[first:]),
        "calibration_skips": first,
        "calibration_retries": metrics[first]["retries_total"],
        "retries": metrics[-1]["retries_total"],
        "scales": scales,
        "state": learner.state(),
    }


class Learner:
    """verl's own, on random tokens.

    Args:
        model: a directory.
        updates: the steps of its learning-rate schedule.
    """

    def __init__(self, model: Path, updates: int) -> None:
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
                    override_config={"attn_implementation": "sdpa", "attention_dropout": DROPOUT},
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
        self.advantage = 1.0
        self.worker.set_loss_fn(self.loss)
        self.engine = self.worker.engine

    def start_at(self, scale: float) -> None:
        self.engine.scaler.load_state_dict({**self.engine.scaler.state_dict(), "scale": scale})

    def update(self, seed: int, advantage: float) -> dict[str, float]:
        import torch
        import torch.distributed as dist

        self.advantage = advantage
        generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        return self.train([torch.randint(2, 90, (TOKENS,), generator=generator) for _ in range(SEQUENCES)])

    def train(self, rows: list[Any], **more: list[Any]) -> dict[str, float]:
        """One update on these sequences' tokens, and more of each; what became of it."""
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
        return {short: float(metrics[name][0][0]) for short, name in names.items()}

    def state(self) -> str:
        """A digest of all ranks' parameters and moments."""
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


def answered_to(asked: Path, answered: Path, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In a rank's process: the answer to a request, written by the first."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = work(json.loads(asked.read_text(encoding="utf-8")))
    if dist.get_rank() == 0:
        answered.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--answer", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answered_to(*arguments.answer, work=answer)
        return
    out: Path = arguments.out.resolve() / "retry"
    out.mkdir(parents=True, exist_ok=True)
    measured = measure(out, arguments.seed)
    (out / "retry.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
