"""SFT, DPO and reward-model training by OpenRLHF's own command lines: the same patches reach them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import openrlhf_environment

pytestmark = [pytest.mark.openrlhf, pytest.mark.e2e]
pytest.importorskip("openrlhf")

FP16_PATCH = str(Path(sys.executable).with_name("fp16-patch"))
OVERFLOWING, STEPS, BATCH = 2**40, 3, 2
DATA = {
    "train_sft": {"data.input_key": "input", "data.output_key": "chosen"},
    "train_dpo": {"data.prompt_key": "input", "data.chosen_key": "chosen", "data.rejected_key": "rejected"},
    "train_rm": {"data.prompt_key": "input", "data.chosen_key": "chosen", "data.rejected_key": "rejected"},
}
SECTIONS = find_spec("openrlhf.utils.config") is not None
# Up to 0.10.1 a flag is its last word, but for these.
WITHOUT_SECTIONS = {
    "model.model_name_or_path": "pretrain",
    "eval.dataset": "eval_dataset",
    "eval.steps": "eval_steps",
    "train.micro_batch_size": "micro_train_batch_size",
    "train.batch_size": "train_batch_size",
    "adam.lr": "learning_rate",
    "ckpt.output_dir": "save_path",
    "ckpt.path": "ckpt_path",
    "logger.tensorboard_dir": "use_tensorboard",
    "logger.wandb.run_name": "wandb_run_name",
}


def pairs(folder: Path) -> Path:
    """Prompts with a right and a wrong answer."""
    rows = [{"input": f"{n:02d}+11=", "chosen": f"{n + 11:03d}", "rejected": f"{n + 12:03d}"} for n in range(16)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(trainer: str, model: Path, out: Path) -> list[str]:
    settings = {
        "model.model_name_or_path": model,
        "data.dataset": pairs(out),
        # Without one, train_rm takes 3 in 100 of so few samples: none, and fails on the empty set.
        **({"eval.dataset": out / "pairs.jsonl"} if trainer == "train_rm" else {}),
        "data.max_samples": STEPS * BATCH,
        "data.max_len": 32,
        "train.micro_batch_size": 1,
        "train.batch_size": BATCH,
        "train.max_epochs": 1,
        "adam.lr": 1e-4,
        "ds.attn_implementation": "sdpa",
        "ckpt.output_dir": out / "model",
        "ckpt.path": out / "checkpoints",
        "logger.tensorboard_dir": out / "tensorboard",
        "logger.wandb.run_name": "run",
        "eval.steps": 1000,
    }
    flags = [word for name, value in (settings | DATA[trainer]).items() for word in (flag(name), str(value))]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", f"openrlhf.cli.{trainer}"]
    return [FP16_PATCH, "run", "--", sys.executable, *launch, *flags]


def flag(name: str) -> str:
    return f"--{name if SECTIONS else WITHOUT_SECTIONS.get(name, name.rpartition('.')[2])}"


def logged(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(f"train/{tag}")]


@pytest.mark.parametrize("trainer", DATA)
def test_one_dtype_and_a_visible_scale(trainer: str, tiny_model: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        command(trainer, tiny_model, tmp_path),
        env=openrlhf_environment({"FP16_PATCH_INIT_SCALE": str(OVERFLOWING)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    asked = ("--ds.param_dtype: bf16", "--param_dtype: bf16", "--bf16: False")
    assert [f"{flag} → fp16" for flag in asked if f"{flag} → fp16" in run.stdout]
    assert run.stdout.count("gradients overflowed at loss scale 1.09951e+12") == 1
    halved = [OVERFLOWING / 2**count for count in range(1, STEPS + 1)]
    assert logged(tmp_path / "tensorboard" / "run", "fp16/loss_scale") == halved
    assert logged(tmp_path / "tensorboard" / "run", "fp16/skipped_total") == [1, 2, 3]
