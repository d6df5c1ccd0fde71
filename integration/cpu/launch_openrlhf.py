"""Start OpenRLHF's own PPO trainer on a CPU, follow it to its end, and leave nothing running."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

from integration.cpu import process
from integration.cpu.process import Job, RunResult

__all__ = ["ENVIRONMENT", "OpenRLHFConfig", "RunResult", "command", "environment", "run"]

MODULES = Path(__file__).resolve().parent
STARTUP = MODULES / "openrlhf_on_cpu" / "startup"
# Arguments for `ray.init`, as JSON; read by openrlhf_on_cpu.cluster.
RAY_INIT = "OPENRLHF_ON_CPU_RAY_INIT"


def _kernels() -> Path:
    """Where DeepSpeed's kernels are kept: its releases would rebuild each other's."""
    try:
        return Path(sys.prefix) / "torch_extensions" / version("deepspeed")
    except PackageNotFoundError:
        return Path(sys.prefix) / "torch_extensions"


ENVIRONMENT = {
    **process.ENVIRONMENT,
    "DS_ACCELERATOR": "cpu",
    # DeepSpeed compiles its CPU kernels when they are first used, with the ninja of this Python's environment; they are
    # kept there, too.
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    "TORCH_EXTENSIONS_DIR": str(_kernels()),
    # An address that every machine has, also one that cannot look up its own name.
    "GLOO_SOCKET_IFNAME": "lo",
}

READY = re.compile(r"Episode \[1/")
STEP = re.compile(r"Global step (\d+): \{(.*)\}")
METRIC = re.compile(r"'([^']+)': ([^,\s]+)")

# Clipping of importance weights, in the words of each release; bounds this wide clip nothing here.
_CORRECTION: Mapping[str, Mapping[str, object]] = {
    ">=0.11.2": {"algo.advantage.is_correction_level": "token", "algo.advantage.is_correction_mode": "clip"},
    "<0.11.2": {"algo.advantage.is_correction_enable": True, "algo.advantage.is_correction_type": "tis"},
}
_CORRECTION_BOUNDS = {"algo.advantage.is_correction_threshold": (0.5, 5.0)}


@dataclass(frozen=True)
class OpenRLHFConfig:
    """A tiny OpenRLHF run. What is not named here goes into ``extra``, as on the command line, which comes last and
    wins; ``prefix`` is a command that runs the trainer's; ``python`` runs the trainer and all that Ray starts for it.

    ``prompts`` is JSON lines of ``input`` and ``label``, at least ``steps * prompts_per_step`` of them. With a reward
    model, ``reward`` is not called; the reward model and the critic start from ``model`` with a new head.
    ``ranks`` are the learner's, actor and critic; reference and reward model have one each.
    """

    model: Path
    prompts: Path
    reward: Path
    out: Path
    steps: int = 3
    zero_stage: Literal[2, 3] = 2
    ranks: int = 1
    estimator: Literal["group_norm", "gae"] = "group_norm"
    use_ref: bool = False
    use_reward_model: bool = False
    ema: bool = False
    # Without fp16_patch, OpenRLHF keeps the sampler's log-probs only for this.
    correction: bool = True
    lora_rank: int = 0
    prompts_per_step: int = 8
    responses_per_prompt: int = 4
    # Samples an optimizer step; None: all of a step's, so that there is one.
    train_batch_size: int | None = None
    # Samples a forward pass on a rank: with fewer than a rank's share, gradients are accumulated.
    train_micro_batch_size: int = 8
    rollout_micro_batch_size: int = 8
    grad_accum_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    max_prompt_tokens: int = 16
    max_response_tokens: int = 32
    learning_rate: float = 1e-4
    extra: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    python: Path = Path(sys.executable)
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = 600.0
    quiet_seconds: float = 180.0


def run(config: OpenRLHFConfig, on_step: Callable[[dict[str, Any]], None] | None = None) -> RunResult:
    """Run the trainer to its end, its death, or its timeout; on return all it started, Ray's daemons too, is gone."""
    config.out.mkdir(parents=True, exist_ok=True)
    process.log_file(config.out).unlink(missing_ok=True)
    shutil.rmtree(_tensorboard(config), ignore_errors=True)
    with process.machine(config.out) as ray_directory:
        release_kernels()
        job = Job(
            command=command(config),
            environment=environment(config, ray_directory),
            out=config.out,
            ready=READY,
            read_steps=lambda: _logged_steps(process.log_file(config.out)),
            steps=config.steps,
            timeout_seconds=config.timeout_seconds,
            quiet_seconds=config.quiet_seconds,
        )
        result = process.run(job, on_step)
    # A trainer that was killed had not written its last events; the log has every step.
    recorded = {step["step"]: step for step in (*result.steps, *_recorded_steps(_tensorboard(config)))}
    return replace(result, steps=[recorded[number] for number in sorted(recorded)])


def environment(config: OpenRLHFConfig, ray_directory: Path) -> dict[str, str]:
    """The caller's environment, without what would tie the run to another cluster, with what a CPU run needs."""
    own = {
        **ENVIRONMENT,
        RAY_INIT: json.dumps(_ray(config, ray_directory)),
        "HF_DATASETS_CACHE": str(config.out.resolve() / "datasets"),
        **config.env,
    }
    return process.environment(own, str(STARTUP), str(MODULES), config.env.get("PYTHONPATH"))


def command(config: OpenRLHFConfig) -> list[str]:
    """``python -m openrlhf.cli.train_ppo_ray`` with the settings of ``config``."""
    settings = {
        **_data(config),
        **_actor(config),
        **_sampler(config),
        **_training(config),
        **_output(config),
        **(_correction() if config.correction else {}),
        **(_reference(config) if config.use_ref else {"algo.kl.init_coef": 0}),
        **(_critic(config) if config.estimator == "gae" else {}),
        **(_reward_model(config) if config.use_reward_model else {"reward.remote_url": config.reward}),
        **(_lora(config) if config.lora_rank else {}),
    }
    trainer = [str(config.python), "-u", "-m", "openrlhf.cli.train_ppo_ray"]
    return [*config.prefix, *trainer, *_arguments(settings), *config.extra]


def _arguments(settings: Mapping[str, object]) -> list[str]:
    """``--key value``; True is a flag that is set, and False and None are left out."""
    arguments: list[str] = []
    for key, value in settings.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{key}")
        if isinstance(value, tuple):
            arguments.extend(map(str, value))
        elif value is not True:
            arguments.append(str(value))
    return arguments


def _data(config: OpenRLHFConfig) -> dict[str, object]:
    return {
        "data.prompt_dataset": config.prompts,
        "data.input_key": "input",
        "data.label_key": "label",
        "data.max_len": config.max_prompt_tokens + config.max_response_tokens + 16,
        # One pass over as many prompts as the steps need: OpenRLHF has no setting for a number of steps.
        "data.max_samples": config.steps * config.prompts_per_step,
        "train.num_episodes": 1,
        "rollout.batch_size": config.prompts_per_step,
        "rollout.n_samples_per_prompt": config.responses_per_prompt,
        "rollout.max_new_tokens": config.max_response_tokens,
        "rollout.micro_batch_size": config.rollout_micro_batch_size,
    }


def _actor(config: OpenRLHFConfig) -> dict[str, object]:
    return {
        "actor.model_name_or_path": config.model,
        "actor.num_nodes": 1,
        "actor.num_gpus_per_node": config.ranks,
        "actor.adam.lr": config.learning_rate,
        "actor.lr_warmup_ratio": 0,
        # FlashAttention, the default, needs CUDA.
        "ds.attn_implementation": "sdpa",
        "ds.zero_stage": config.zero_stage,
        "ds.grad_accum_dtype": config.grad_accum_dtype,
    }


def _sampler(config: OpenRLHFConfig) -> dict[str, object]:
    return {
        "vllm.num_engines": 1,
        "vllm.tensor_parallel_size": 1,
        "vllm.enforce_eager": True,
        "vllm.sync_backend": "gloo",
        "vllm.gpu_memory_utilization": 0.1,
    }


def _correction() -> dict[str, object]:
    installed = version("openrlhf")
    (flags,) = (flags for releases, flags in _CORRECTION.items() if SpecifierSet(releases).contains(installed))
    return {**flags, **_CORRECTION_BOUNDS}


def _training(config: OpenRLHFConfig) -> dict[str, object]:
    samples = config.prompts_per_step * config.responses_per_prompt
    return {
        "algo.advantage.estimator": config.estimator,
        "train.batch_size": config.train_batch_size or samples,
        "train.micro_batch_size": config.train_micro_batch_size,
        "train.max_epochs": 1,
        "train.enable_ema": config.ema,
    }


def _reference(config: OpenRLHFConfig) -> dict[str, object]:
    return {"algo.kl.init_coef": 0.01, "ref.num_nodes": 1, "ref.num_gpus_per_node": 1}


def _critic(config: OpenRLHFConfig) -> dict[str, object]:
    return {
        "critic.model_name_or_path": config.model,
        "critic.num_nodes": 1,
        "critic.num_gpus_per_node": config.ranks,
        "critic.adam.lr": config.learning_rate,
        "critic.lr_warmup_ratio": 0,
    }


def _reward_model(config: OpenRLHFConfig) -> dict[str, object]:
    return {"reward.model_name_or_path": config.model, "reward.num_nodes": 1, "reward.num_gpus_per_node": 1}


def _lora(config: OpenRLHFConfig) -> dict[str, object]:
    return {"ds.lora.rank": config.lora_rank, "ds.lora.alpha": 2 * config.lora_rank}


def _output(config: OpenRLHFConfig) -> dict[str, object]:
    out = config.out.resolve()
    return {
        "ckpt.output_dir": out / "model",
        "ckpt.path": out / "checkpoints",
        "logger.tensorboard_dir": _tensorboard(config).parent,
        # Names the folder in it, whether or not wandb is used.
        "logger.wandb.run_name": _tensorboard(config).name,
    }


def _ray(config: OpenRLHFConfig, ray_directory: Path) -> dict[str, object]:
    learners = config.ranks * (2 if config.estimator == "gae" else 1)
    engines = 1
    return {
        # "local" starts a cluster of its own even where another one is running.
        "address": "local",
        "_temp_dir": str(ray_directory),
        "num_cpus": 16,
        # Ray schedules by count: GPUs that are only declared place workers as real ones would.
        "num_gpus": engines + learners + config.use_ref + config.use_reward_model,
        "include_dashboard": False,
        "object_store_memory": 500_000_000,
        "runtime_env": {"py_executable": str(config.python)},
    }


def release_kernels() -> None:
    """Drop the locks of processes that were killed while they loaded a kernel: all others would wait for them for ever.

    Torch's lock is the file's existence; whoever is alive and has it keeps the file open.
    """
    for lock in Path(ENVIRONMENT["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        if not any(_is_link_to(lock, descriptor) for descriptor in Path("/proc").glob("[0-9]*/fd/*")):
            lock.unlink(missing_ok=True)


def _is_link_to(target: Path, link: Path) -> bool:
    try:
        return link.readlink() == target
    except OSError:
        # The process, or its file, is gone since it was listed.
        return False


def _tensorboard(config: OpenRLHFConfig) -> Path:
    return config.out.resolve() / "tensorboard" / "run"


def _logged_steps(log: Path) -> list[dict[str, Any]]:
    """The metrics of each step as the trainer prints them; a line that is still in writing is left for later."""
    if not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    return [_step(found) for line in lines if (found := STEP.search(line))]


def _step(found: re.Match[str]) -> dict[str, Any]:
    return {"step": int(found[1]), **{name: float(value) for name, value in METRIC.findall(found[2])}}


def _recorded_steps(tensorboard: Path) -> list[dict[str, Any]]:
    """The metrics of each step as OpenRLHF wrote them for TensorBoard, in float32."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if not tensorboard.exists():
        return []
    events = EventAccumulator(str(tensorboard), size_guidance={SCALARS: 0})
    events.Reload()
    steps: dict[int, dict[str, Any]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("train/"):
            for event in events.Scalars(tag):
                steps.setdefault(event.step, {"step": event.step})[tag.removeprefix("train/")] = event.value
    return list(steps.values())
