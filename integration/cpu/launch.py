"""Start verl's own PPO trainer on a CPU, follow it to its end, and leave nothing running."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

from integration.cpu import process
from integration.cpu.process import Job, RunResult
from integration.cpu.trainers import ENTRY_POINTS, Trainer

__all__ = [
    "ENVIRONMENT",
    "LaunchConfig",
    "RunResult",
    "Sampler",
    "Strategy",
    "Trainer",
    "command",
    "environment",
    "run",
]

MODULES = Path(__file__).resolve().parent

ENVIRONMENT = {
    **process.ENVIRONMENT,
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
    "VERL_PLATFORM": "cpu",
    # The FSDP engines are registered for cuda and npu only; any other device finds them under one of these names.
    "VERL_ENGINE_DEVICE": "cuda",
    "HYDRA_FULL_ERROR": "1",
}
# Beside these, where SGLang samples. Its search path is the folder of what stands in for packages of CUDA kernels.
SGLANG_ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,sglang_on_cpu",
    "SGLANG_USE_CPU_ENGINE": "1",
}
# Beside the first, where Megatron learns. Compiling takes longer than such a run does.
MEGATRON_ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,megatron_on_cpu",
    "TORCHDYNAMO_DISABLE": "1",
}
SGLANG_PACKAGES = MODULES / "sglang_on_cpu" / "packages"
SGLANG_ARGUMENTS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "max_total_tokens": 8192,
    "disable_overlap_schedule": True,
    # Sleeping needs CUDA's virtual memory.
    "enable_memory_saver": False,
}
# Its fused kernels are CUDA's.
MEGATRON_TRANSFORMER_CONFIG = {
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "moe_permute_fusion": False,
    "persist_layer_norm": False,
    "attention_backend": "unfused",
}
# What is spelled otherwise in other releases of verl. Before 0.9.0 it knows no device but GPUs and NPUs by name.
_DEVICE = {">=0.9": "cpu", "<0.9": "cuda"}
_CRITIC_ENGINE = {">=0.8": "critic.fsdp", "<0.8": "critic.model.fsdp_config"}

Sampler = Literal["vllm", "sglang"]
Strategy = Literal["fsdp", "fsdp2", "megatron", "veomni"]


@dataclass(frozen=True)
class LaunchConfig:
    """A tiny verl run. What is not named here goes into ``overrides``, in hydra's syntax, which come last and win;
    ``prefix`` is a command that runs the trainer's; ``python`` runs the trainer and all that Ray starts for it;
    ``tensor_parallel`` is how many ranks share each of Megatron's layers; ``standalone_samplers`` is how many replicas
    have devices of their own where the trainer has such, and ``updates_per_sync`` how many batches its learner takes a
    step in, at whose end they get the weights."""

    model: Path
    train_files: Path
    val_files: Path
    reward: Path
    out: Path
    reward_name: str = "compute_score"
    steps: int = 3
    trainer: Trainer = "sync"
    sampler: Sampler = "vllm"
    strategy: Strategy = "fsdp"
    ranks: int = 1
    tensor_parallel: int = 1
    standalone_samplers: int = 1
    updates_per_sync: int = 1
    adv_estimator: Literal["grpo", "gae"] = "grpo"
    use_ref: bool = False
    lora_rank: int = 0
    prompts_per_step: int = 8
    responses_per_prompt: int = 4
    max_prompt_tokens: int = 16
    max_response_tokens: int = 32
    learning_rate: float = 1e-4
    overrides: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    python: Path = Path(sys.executable)
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = 600.0
    quiet_seconds: float = 180.0


def run(config: LaunchConfig, on_step: Callable[[dict[str, Any]], None] | None = None) -> RunResult:
    """Run the trainer to its end, its death, or its timeout; on return all it started, Ray's daemons too, is gone."""
    config.out.mkdir(parents=True, exist_ok=True)
    metrics = _metrics_file(config)
    metrics.unlink(missing_ok=True)
    with process.machine(config.out) as ray_directory:
        job = Job(
            command=command(config, ray_directory),
            environment=environment(config),
            out=config.out,
            ready=ENTRY_POINTS[config.trainer].ready,
            read_steps=lambda: list(_steps(metrics)),
            steps=config.steps,
            timeout_seconds=config.timeout_seconds,
            quiet_seconds=config.quiet_seconds,
        )
        return process.run(job, on_step)


def environment(config: LaunchConfig) -> dict[str, str]:
    """The caller's environment, without what would tie the run to another cluster, with what a CPU run needs."""
    sglang = config.sampler == "sglang"
    sampler = SGLANG_ENVIRONMENT if sglang else {}
    learner = MEGATRON_ENVIRONMENT if config.strategy == "megatron" else {}
    trainer = ENTRY_POINTS[config.trainer].environment
    log = {"VERL_FILE_LOGGER_PATH": str(_metrics_file(config))}
    own = {**ENVIRONMENT, **sampler, **learner, **trainer, **log, **config.env}
    packages = str(SGLANG_PACKAGES) if sglang else None
    return process.environment(own, str(MODULES), packages, config.env.get("PYTHONPATH"))


def command(config: LaunchConfig, ray_directory: Path) -> list[str]:
    """``python -m`` of verl's trainer with the settings of ``config``."""
    entry_point = ENTRY_POINTS[config.trainer]
    settings = {
        **_data(config),
        **_actor(config),
        **_rollout(config),
        **(_sglang() if config.sampler == "sglang" else {}),
        **_trainer(config),
        **_ray(config, ray_directory),
        **(_critic(config) if config.adv_estimator == "gae" else {}),
        **(_lora(config) if config.lora_rank else {}),
        **entry_point.settings(config),
    }
    assignments = [f"{key}={value}" for key, value in settings.items()]
    trainer = [str(config.python), "-u", "-m", entry_point.module]
    return [*config.prefix, *trainer, *assignments, *config.overrides]


def _data(config: LaunchConfig) -> dict[str, object]:
    return {
        "data.train_files": config.train_files,
        "data.val_files": config.val_files,
        "data.train_batch_size": config.prompts_per_step,
        "data.max_prompt_length": config.max_prompt_tokens,
        "data.max_response_length": config.max_response_tokens,
        "data.dataloader_num_workers": 0,
        "data.filter_overlong_prompts": False,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": config.reward,
        "reward.custom_reward_function.name": config.reward_name,
    }


def _actor(config: LaunchConfig) -> dict[str, object]:
    return {
        "actor_rollout_ref.model.path": config.model,
        **_LEARNERS[config.strategy](config),
        "actor_rollout_ref.actor.optim.lr": config.learning_rate,
        "actor_rollout_ref.actor.ppo_mini_batch_size": config.prompts_per_step,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": _micro_batch(config),
        "actor_rollout_ref.actor.use_kl_loss": config.use_ref,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": _micro_batch(config),
    }


def _micro_batch(config: LaunchConfig) -> int:
    """What is computed at once; each rank's share of an update has to be a multiple of it."""
    responses = config.prompts_per_step * config.responses_per_prompt
    return min(16, responses // config.updates_per_sync // config.ranks)


def _fsdp(config: LaunchConfig) -> dict[str, object]:
    return {
        **_model_without_flash_attention("actor_rollout_ref.model"),
        "actor_rollout_ref.actor.strategy": config.strategy,
        "actor_rollout_ref.actor.fsdp_config.strategy": config.strategy,
        "actor_rollout_ref.ref.strategy": config.strategy,
        "actor_rollout_ref.ref.fsdp_config.strategy": config.strategy,
        # Compiling takes longer than such a run does.
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile": False,
    }


def _megatron(config: LaunchConfig) -> dict[str, object]:
    of_a_role = {
        "tensor_model_parallel_size": config.tensor_parallel,
        **{f"override_transformer_config.{name}": value for name, value in MEGATRON_TRANSFORMER_CONFIG.items()},
    }
    roles = ("actor", "ref")
    settings = {f"++actor_rollout_ref.{role}.megatron.{key}": of_a_role[key] for role in roles for key in of_a_role}
    return {"model_engine": "megatron", "actor_rollout_ref.model.enable_gradient_checkpointing": False, **settings}


def _veomni(_config: LaunchConfig) -> dict[str, object]:
    return {
        **_model_without_flash_attention("actor_rollout_ref.model"),
        "model_engine": "veomni",
        # The ref's kernels are the actor's. Flash attention and the fused experts are for GPUs.
        "actor_rollout_ref.actor.veomni.attn_implementation": "eager",
        "actor_rollout_ref.actor.veomni.moe_implementation": "eager",
        "actor_rollout_ref.actor.use_torch_compile": False,
    }


_LEARNERS: Mapping[Strategy, Callable[[LaunchConfig], dict[str, object]]] = {
    "fsdp": _fsdp,
    "fsdp2": _fsdp,
    "megatron": _megatron,
    "veomni": _veomni,
}


def _model_without_flash_attention(prefix: str) -> dict[str, object]:
    """Padding can be removed only by flash-attn's kernels, which need CUDA."""
    return {
        f"{prefix}.use_remove_padding": False,
        f"+{prefix}.override_config.attn_implementation": "sdpa",
        f"{prefix}.enable_gradient_checkpointing": False,
    }


def _rollout(config: LaunchConfig) -> dict[str, object]:
    rollout = "actor_rollout_ref.rollout"
    return {
        f"{rollout}.name": config.sampler,
        f"{rollout}.n": config.responses_per_prompt,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": _micro_batch(config),
        f"{rollout}.enforce_eager": True,
        # Sleeping frees GPU memory between phases; vLLM's CPU build cannot.
        f"{rollout}.free_cache_engine": False,
        f"+{rollout}.enable_sleep_mode": False,
        f"{rollout}.max_num_batched_tokens": 512,
        f"{rollout}.max_num_seqs": config.prompts_per_step * config.responses_per_prompt,
        f"{rollout}.max_model_len": config.max_prompt_tokens + config.max_response_tokens + 16,
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes": 32,
        f"{rollout}.agent.num_workers": 1,
        f"{rollout}.skip_tokenizer_init": False,
    }


def _sglang() -> dict[str, object]:
    rollout = "actor_rollout_ref.rollout"
    arguments = {f"+{rollout}.engine_kwargs.sglang.{name}": value for name, value in SGLANG_ARGUMENTS.items()}
    return {f"{rollout}.gpu_memory_utilization": 0.1, **arguments}


def _critic(config: LaunchConfig) -> dict[str, object]:
    return {
        "critic.model.path": config.model,
        "critic.model.tokenizer_path": config.model,
        **_model_without_flash_attention("critic.model"),
        "critic.strategy": config.strategy,
        f"{_in_this_release(_CRITIC_ENGINE)}.strategy": config.strategy,
        f"{_in_this_release(_CRITIC_ENGINE)}.use_torch_compile": False,
        "critic.optim.lr": config.learning_rate,
        "critic.ppo_micro_batch_size_per_gpu": _micro_batch(config),
    }


def _in_this_release(spelled: Mapping[str, str]) -> str:
    installed = version("verl")
    return next(word for releases, word in spelled.items() if SpecifierSet(releases).contains(installed))


def _lora(config: LaunchConfig) -> dict[str, object]:
    return {
        "actor_rollout_ref.model.lora_rank": config.lora_rank,
        "actor_rollout_ref.model.lora_alpha": 2 * config.lora_rank,
        # vLLM gets merged weights: serving adapters needs its GPU kernels.
        "actor_rollout_ref.model.lora.merge": True,
    }


def _trainer(config: LaunchConfig) -> dict[str, object]:
    return {
        "algorithm.adv_estimator": config.adv_estimator,
        "trainer.device": _in_this_release(_DEVICE),
        "trainer.n_gpus_per_node": config.ranks,
        "trainer.nnodes": 1,
        "trainer.total_epochs": 1_000_000,
        "trainer.total_training_steps": config.steps,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "trainer.logger": "[console,file]",
        "trainer.default_local_dir": config.out / "checkpoints",
        # Added where a release has no such section, and unread there.
        "++transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "hydra.run.dir": config.out / "hydra",
    }


def _ray(config: LaunchConfig, ray_directory: Path) -> dict[str, object]:
    init = "ray_kwargs.ray_init"
    return {
        # "local" starts a cluster of its own even where another one is running.
        f"+{init}.address": "local",
        f"+{init}._temp_dir": ray_directory,
        f"{init}.num_cpus": 16,
        f"+{init}.num_gpus": config.ranks,
        f"+{init}.include_dashboard": False,
        f"+{init}.object_store_memory": 500_000_000,
        f"+{init}.runtime_env.py_executable": config.python,
    }


def _steps(metrics: Path) -> Iterator[dict[str, Any]]:
    """verl's file logger writes a line a step, the fully asynchronous trainer several; the last may be in writing."""
    if not metrics.exists():
        return
    steps: dict[int, dict[str, Any]] = {}
    for line in metrics.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            logged = json.loads(line)
            steps.setdefault(logged["step"], {"step": logged["step"]}).update(logged["data"])
    yield from steps.values()


def _metrics_file(config: LaunchConfig) -> Path:
    return config.out.resolve() / "metrics.jsonl"
