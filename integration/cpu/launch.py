"""Start verl's own PPO trainer on a CPU, follow it to its end, and leave nothing running."""

import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

MODULES = Path(__file__).resolve().parent

ENVIRONMENT = {
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
    "VERL_PLATFORM": "cpu",
    # The FSDP engines are registered for cuda and npu only; any other device finds them under one of these names.
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Pinned threads of two engines, or of two runs, would share the same cores while others idle.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HYDRA_FULL_ERROR": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Left on, Ray drops repeated lines, and with them the evidence of which process said what.
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    # Declared GPUs are not there: Ray must not hide them from actors that ask for none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray would start a Python worker for each of the declared CPUs, most of them never used.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}
# A setting of the caller's shell that would join the run to another cluster.
FOREIGN_CLUSTER = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_TMPDIR")

READY = re.compile(r"all initialize finished, ready to fit")
# The engine died but the trainer waits on for its answer: verl has no timeout there, so the run would hang.
FATAL = re.compile(
    r"EngineDeadError|EngineCore encountered a fatal error|EngineCore failed to start"
    r"|Worker proc \S+ died unexpectedly|WorkerProc hit an exception|WorkerProc failed to start"
    r"|A worker died or was killed while executing a task|The actor died unexpectedly"
)
CAUSE = re.compile(r"\b\w+(?:Error|Exception): .+")
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class LaunchConfig:
    """A tiny verl run. What is not named here goes into ``overrides``, in hydra's syntax, which come last and win;
    ``prefix`` is a command that runs the trainer's."""

    model: Path
    train_files: Path
    val_files: Path
    reward: Path
    out: Path
    reward_name: str = "compute_score"
    steps: int = 3
    strategy: Literal["fsdp", "fsdp2"] = "fsdp"
    ranks: int = 1
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
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = 600.0
    quiet_seconds: float = 180.0


@dataclass(frozen=True)
class RunResult:
    """How a run ended. ``reason`` says why it was stopped, None when the trainer exited by itself.

    ``steps`` are verl's metrics, one dict a step; its logger writes a NaN as null, so it reads back as None.
    """

    returncode: int | None
    reason: str | None
    steps: list[dict[str, Any]]
    wall_seconds: float
    ready_seconds: float | None
    log: Path

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and self.reason is None

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def run(config: LaunchConfig, on_step: Callable[[dict[str, Any]], None] | None = None) -> RunResult:
    """Run the trainer to its end, its death, or its timeout; on return all it started, Ray's daemons too, is gone."""
    config.out.mkdir(parents=True, exist_ok=True)
    metrics = _metrics_file(config)
    metrics.unlink(missing_ok=True)
    with _one_run_at_a_time(), _ray_directory(config.out) as ray_directory:
        started = time.monotonic()
        with _Trainer(command(config, ray_directory), environment(config), config.out) as trainer:
            reason = _follow(trainer, config, on_step or (lambda _step: None))
        wall_seconds = time.monotonic() - started
    return RunResult(
        returncode=trainer.process.returncode,
        reason=reason,
        steps=list(_steps(metrics)),
        wall_seconds=wall_seconds,
        ready_seconds=trainer.ready_seconds,
        log=trainer.log,
    )


def environment(config: LaunchConfig) -> dict[str, str]:
    """The caller's environment, without what would tie the run to another cluster, with what a CPU run needs."""
    inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN_CLUSTER}
    search_path = [str(MODULES), config.env.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
    own = {
        "VERL_FILE_LOGGER_PATH": str(_metrics_file(config)),
        **config.env,
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
    }
    return {**inherited, **ENVIRONMENT, **own}


def command(config: LaunchConfig, ray_directory: Path) -> list[str]:
    """``python -m verl.trainer.main_ppo`` with the settings of ``config``."""
    settings = {
        **_data(config),
        **_actor(config),
        **_rollout(config),
        **_trainer(config),
        **_ray(config, ray_directory),
        **(_critic(config) if config.adv_estimator == "gae" else {}),
        **(_lora(config) if config.lora_rank else {}),
    }
    assignments = [f"{key}={value}" for key, value in settings.items()]
    trainer = [sys.executable, "-u", "-m", "verl.trainer.main_ppo"]
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
        **_model_without_flash_attention("actor_rollout_ref.model"),
        "actor_rollout_ref.actor.strategy": config.strategy,
        "actor_rollout_ref.actor.fsdp_config.strategy": config.strategy,
        "actor_rollout_ref.ref.strategy": config.strategy,
        "actor_rollout_ref.ref.fsdp_config.strategy": config.strategy,
        "actor_rollout_ref.actor.optim.lr": config.learning_rate,
        "actor_rollout_ref.actor.ppo_mini_batch_size": config.prompts_per_step,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 16,
        "actor_rollout_ref.actor.use_kl_loss": config.use_ref,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 16,
        # Compiling takes longer than such a run does.
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile": False,
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
        f"{rollout}.name": "vllm",
        f"{rollout}.n": config.responses_per_prompt,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": 16,
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


def _critic(config: LaunchConfig) -> dict[str, object]:
    return {
        "critic.model.path": config.model,
        "critic.model.tokenizer_path": config.model,
        **_model_without_flash_attention("critic.model"),
        "critic.strategy": config.strategy,
        "critic.fsdp.strategy": config.strategy,
        "critic.fsdp.use_torch_compile": False,
        "critic.optim.lr": config.learning_rate,
        "critic.ppo_micro_batch_size_per_gpu": 16,
    }


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
        "trainer.device": "cpu",
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
        "trainer.v1.sampler.custom_sampler.path": "pkg://verl_on_cpu.replay",
        "trainer.v1.sampler.custom_sampler.name": "AttentiveReplayBuffer",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
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
    }


class _Trainer:
    """The trainer's process, its log with the seconds since its start before each line, and its end."""

    def __init__(self, arguments: list[str], env: dict[str, str], out: Path) -> None:
        self.log = out / "log.txt"
        self.ready_seconds: float | None = None
        self.fatal_line: str | None = None
        self.cause: str | None = None
        self.started = self.last_line = time.monotonic()
        self.process = subprocess.Popen(
            arguments,
            env=env,
            cwd=out,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A session holds all the run starts: Ray gives workers process groups of their own, but not sessions.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)

    def __enter__(self) -> "_Trainer":
        self._reader.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            _wait(self.process, GRACE_SECONDS)
        _kill_session(self.process.pid)
        self.process.wait()
        self._reader.join(GRACE_SECONDS)

    def _read(self, output: IO[str]) -> None:
        with self.log.open("w", buffering=1) as log:
            for line in output:
                self.last_line = time.monotonic()
                elapsed = self.last_line - self.started
                log.write(f"[{elapsed:7.2f}] {line}")
                if self.ready_seconds is None and READY.search(line):
                    self.ready_seconds = elapsed
                if self.fatal_line is None and FATAL.search(line):
                    self.fatal_line = line.strip()
                elif self.fatal_line and self.cause is None and (cause := CAUSE.search(line)):
                    self.cause = cause.group().strip()


def _follow(trainer: _Trainer, config: LaunchConfig, on_step: Callable[[dict[str, Any]], None]) -> str | None:
    """Report steps as they are logged until the trainer exits; returns why it has to be stopped, if it has to."""
    reported = 0
    while True:
        exited = trainer.process.poll() is not None
        for step in list(_steps(_metrics_file(config)))[reported:]:
            reported += 1
            on_step(step)
        if exited:
            return None
        # After the last step the engines are torn down, and say so in the words of a failure.
        if reason := _reason_to_stop(trainer, config, finished=reported >= config.steps):
            return reason
        time.sleep(POLL_SECONDS)


def _reason_to_stop(trainer: _Trainer, config: LaunchConfig, *, finished: bool) -> str | None:
    now = time.monotonic()
    if now - trainer.started > config.timeout_seconds:
        return f"timed out after {config.timeout_seconds:.0f} s"
    if now - trainer.last_line > config.quiet_seconds:
        return f"logged nothing for {config.quiet_seconds:.0f} s"
    if trainer.fatal_line and not finished and not _wait(trainer.process, GRACE_SECONDS):
        return f"hung after: {trainer.cause or trainer.fatal_line}"
    return None


def _steps(metrics: Path) -> Iterator[dict[str, Any]]:
    """verl's file logger writes a line a step; the last one may still be in writing."""
    if not metrics.exists():
        return
    for line in metrics.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            logged = json.loads(line)
            yield {"step": logged["step"], **logged["data"]}


def _metrics_file(config: LaunchConfig) -> Path:
    return config.out.resolve() / "metrics.jsonl"


@contextmanager
def _one_run_at_a_time() -> Iterator[None]:
    """verl names its weight-transfer socket after the Ray job id, which every new cluster counts from 1."""
    # Two runs would bind the same path, and the second take the first one's weights.
    with (Path(tempfile.gettempdir()) / "verl-on-cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _ray_directory(out: Path) -> Iterator[Path]:
    """Ray's files, in /tmp because a socket's path must stay below 108 characters; its logs are copied to ``out``."""
    directory = Path(tempfile.mkdtemp(prefix="vr", dir="/tmp"))
    try:
        yield directory
    finally:
        logs = directory / "session_latest" / "logs"
        if logs.exists():
            shutil.copytree(logs, out / "ray", dirs_exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


def _die_with_parent() -> None:
    """Runs in the child: a launcher that is killed takes the trainer with it, and the trainer its cluster."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _wait(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_session(session: int) -> None:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.getsid(int(entry.name)) == session:
                os.kill(int(entry.name), signal.SIGKILL)
        except ProcessLookupError:
            continue
