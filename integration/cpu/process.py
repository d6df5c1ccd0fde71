"""A trainer that has the machine to itself: started with its own Ray, followed to its end, gone with all it started."""

import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Step = dict[str, Any]

# What Ray and vLLM need on a CPU, whichever framework uses them.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Pinned threads of two engines, or of two runs, would share the same cores while others idle.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
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

# The engine died but the trainer waits on for its answer, without a timeout: the run would hang.
FATAL = re.compile(
    r"EngineDeadError|EngineCore encountered a fatal error|EngineCore failed to start"
    r"|Worker proc \S+ died unexpectedly|WorkerProc hit an exception|WorkerProc failed to start"
    r"|A worker died or was killed while executing a task|The actor died unexpectedly"
)
CAUSE = re.compile(r"\b\w+(?:Error|Exception): .+")
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """A trainer's command line, and how to tell from outside that it is ready and which steps it has done."""

    command: list[str]
    environment: Mapping[str, str]
    out: Path
    ready: re.Pattern[str]
    read_steps: Callable[[], list[Step]]
    steps: int
    timeout_seconds: float
    quiet_seconds: float

    @property
    def log(self) -> Path:
        return log_file(self.out)


@dataclass(frozen=True)
class RunResult:
    """How a run ended. ``reason`` says why it was stopped, None when the trainer exited by itself.

    ``error`` is the first error logged when an engine or worker failed, None if none said so.
    ``steps`` are the framework's metrics, one dict a step; verl writes a NaN as null, so it reads back as None.
    """

    returncode: int | None
    reason: str | None
    steps: list[Step]
    wall_seconds: float
    ready_seconds: float | None
    log: Path
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and self.reason is None

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def log_file(out: Path) -> Path:
    """All that the run printed, each line with the seconds since its start."""
    return out / "log.txt"


def environment(own: Mapping[str, str], *search_path: str | None) -> dict[str, str]:
    """The caller's environment without what would tie the run to another cluster, with ``own``, which wins.

    ``search_path`` comes before the caller's on ``PYTHONPATH``.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN_CLUSTER}
    modules = os.pathsep.join(filter(None, (*search_path, os.environ.get("PYTHONPATH"))))
    return {**inherited, **own, "PYTHONPATH": modules}


@contextmanager
def machine(out: Path) -> Iterator[Path]:
    """Wait for other runs on this machine to end; yields a directory for this run's Ray."""
    with _one_run_at_a_time(), _ray_directory(out) as directory:
        yield directory


def run(job: Job, on_step: Callable[[Step], None] | None = None) -> RunResult:
    """Run the trainer to its end, its death, or its timeout; on return all it started, Ray's daemons too, is gone."""
    started = time.monotonic()
    with _Trainer(job) as trainer:
        reason = _follow(trainer, job, on_step or (lambda _step: None))
    return RunResult(
        returncode=trainer.process.returncode,
        reason=reason,
        steps=job.read_steps(),
        wall_seconds=time.monotonic() - started,
        ready_seconds=trainer.ready_seconds,
        log=job.log,
        error=trainer.error,
    )


class _Trainer:
    """The trainer's process, its log with the seconds since its start before each line, and its end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ready_seconds: float | None = None
        self.fatal_line: str | None = None
        self.cause: str | None = None
        self.started = self.last_line = time.monotonic()
        self.process = subprocess.Popen(
            job.command,
            env=job.environment,
            cwd=job.out,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A session holds all the run starts: Ray gives workers process groups of their own, but not sessions.
            start_new_session=True,
            preexec_fn=die_with_parent,
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

    @property
    def error(self) -> str | None:
        return self.cause or self.fatal_line

    def _read(self, output: IO[str]) -> None:
        with self.job.log.open("w", buffering=1) as log:
            for line in output:
                self.last_line = time.monotonic()
                elapsed = self.last_line - self.started
                log.write(f"[{elapsed:7.2f}] {line}")
                if self.ready_seconds is None and self.job.ready.search(line):
                    self.ready_seconds = elapsed
                if self.fatal_line is None and FATAL.search(line):
                    self.fatal_line = line.strip()
                elif self.fatal_line and self.cause is None and (cause := CAUSE.search(line)):
                    self.cause = cause.group().strip()


def _follow(trainer: _Trainer, job: Job, on_step: Callable[[Step], None]) -> str | None:
    """Report steps as they are logged until the trainer exits; returns why it has to be stopped, if it has to."""
    reported = 0
    while True:
        exited = trainer.process.poll() is not None
        for step in job.read_steps()[reported:]:
            reported += 1
            on_step(step)
        if exited:
            return None
        # After the last step the engines are torn down, and say so in the words of a failure.
        if reason := _reason_to_stop(trainer, job, finished=reported >= job.steps):
            return reason
        time.sleep(POLL_SECONDS)


def _reason_to_stop(trainer: _Trainer, job: Job, *, finished: bool) -> str | None:
    now = time.monotonic()
    if now - trainer.started > job.timeout_seconds:
        return f"timed out after {job.timeout_seconds:.0f} s"
    if now - trainer.last_line > job.quiet_seconds:
        return f"logged nothing for {job.quiet_seconds:.0f} s"
    if trainer.fatal_line and not finished and not _wait(trainer.process, GRACE_SECONDS):
        return f"hung after: {trainer.error}"
    return None


@contextmanager
def _one_run_at_a_time() -> Iterator[None]:
    """Two runs would share cores and memory; and verl's also a socket, named after the Ray job id, which every new
    cluster counts from 1: the second run would take the first one's weights."""
    with (Path(tempfile.gettempdir()) / "rl-on-cpu.lock").open("w") as lock:
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


def die_with_parent() -> None:
    """Runs in the child: a launcher that is killed takes with it what it has started, and a trainer its cluster."""
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
