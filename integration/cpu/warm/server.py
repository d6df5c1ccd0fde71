"""A process that imports what is slow to import, once, and forks Python processes from there.

    python -m integration.cpu.warm.server PRELOAD INTERPRETER DESCRIPTOR

`PRELOAD` is a module to import. `INTERPRETER` is the executable that asks for processes, and what `multiprocessing`
starts in them, too. `DESCRIPTOR` is a socket that listens already. Each process has a supervisor, forked too, which
ends it when nobody waits for it any more, and with it all that it started. The server itself runs no kernel, starts no
thread, joins no process group, and ends with its standard input.

A forked process sees what a new one would: arguments, environment, search path and open files of whoever asked,
`sitecustomize` run, its program as `__main__`. What cannot be had by a fork is declined: another value of a variable
that an imported module has read, another copy of a package that is imported already.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# What numerical libraries, torch, transformers and DeepSpeed read when they are imported, and the loader before them.
READ_AT_IMPORT = ("OMP_", "MKL_", "KMP_", "OPENBLAS_", "LD_", "TORCH_", "PYTORCH_", "HF_HOME", "HF_HUB_", "DS_")
# vLLM sets them for what it starts.
PRELOADED_LIBRARIES = "LD_PRELOAD"
READ_LATER = {"PYTORCH_NVML_BASED_CUDA_CHECK", "TORCH_CUDA_ARCH_LIST", "TORCH_NCCL_AVOID_RECORD_STREAMS"}
# jemalloc's, which pyarrow brings: made for forks.
HARMLESS_THREADS = {"jemalloc_bg_thd"}
# Of Python's options, those that change nothing but buffers and bytecode.
IGNORED_OPTIONS = {"-u", "-B"}
# The server's own descriptors: above those that a process may want.
OWN_DESCRIPTORS = 500
GRACE_S = 5.0
POLL_S = 0.05


@dataclass(frozen=True)
class Start:
    """What this process was started with.

    Attributes:
        environment: before anything was imported.
        set_by_imports: variables that the imported modules have set.
        search_path: what is on it for every process of this interpreter.
        descriptors: that are open.
    """

    environment: Mapping[str, str]
    set_by_imports: Mapping[str, str]
    search_path: list[str]
    descriptors: set[int]


@dataclass(frozen=True)
class Request:
    """A command line of Python, and what the process that was asked to run it was started with."""

    arguments: list[str]
    directory: str
    environment: dict[str, str]
    descriptors: list[int]
    niceness: int

    @property
    def command(self) -> list[str]:
        """The arguments from the program on."""
        return [each for number, each in enumerate(self.arguments) if not self._is_ignored(number)]

    def _is_ignored(self, number: int) -> bool:
        return set(self.arguments[: number + 1]) <= IGNORED_OPTIONS

    @property
    def search_path(self) -> list[str]:
        return _search_path(self.environment)


def main() -> None:
    preload, interpreter, descriptor = sys.argv[1:]
    started = dict(os.environ)
    importlib.import_module(preload)
    threads = [name for name in _threads() if name not in HARMLESS_THREADS]
    if len(threads) > 1:
        sys.exit(f"importing {preload} started threads, which a fork would not have: {threads}")
    multiprocessing.set_executable(interpreter)
    listener = socket.socket(fileno=fcntl.fcntl(int(descriptor), fcntl.F_DUPFD_CLOEXEC, OWN_DESCRIPTORS))
    os.close(int(descriptor))
    start = Start(
        started,
        {name: value for name, value in os.environ.items() if started.get(name) != value},
        _search_path_of_others(started),
        _open_descriptors() - {0, 1, 2},
    )
    gc.collect()
    gc.freeze()
    with listener:
        _serve(listener, start)


def _serve(listener: socket.socket, start: Start) -> None:
    poll = select.poll()
    for source in (listener.fileno(), sys.stdin.fileno()):
        poll.register(source, select.POLLIN | select.POLLHUP)
    server = os.getpid()
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(1000)}
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin.fileno() in ready:
            return
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _supervise(server, connection, start)


def _supervise(server: int, connection: socket.socket, start: Start) -> NoReturn:
    """Answer `cold` and a reason, or `warm` and then the exit status of the process."""
    try:
        _die_with(server)
        own = socket.socket(fileno=fcntl.fcntl(connection.detach(), fcntl.F_DUPFD_CLOEXEC, OWN_DESCRIPTORS))
        received, descriptors, _, _ = socket.recv_fds(own, 1, 250)
        passed = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, OWN_DESCRIPTORS) for each in descriptors]
        for each in descriptors:
            os.close(each)
        request = Request(**json.loads(received + own.makefile("rb").readline()))
        reason = _reason_to_decline(request, start)
        if reason:
            print(f"cold, as {reason}: {request.arguments[:3]}", file=sys.stderr)
            own.sendall(f"cold: {reason}\n".encode())
        else:
            own.sendall(b"warm\n")
            own.sendall(b"%d\n" % _run(request, passed, own, start))
    except (BrokenPipeError, ConnectionResetError):
        pass  # whoever asked has gone
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _reason_to_decline(request: Request, start: Start) -> str | None:
    if not request.command or (request.command[0].startswith("-") and request.command[0] not in ("-m", "-c")):
        return "its options are not known"
    if taken := set(request.descriptors) & start.descriptors:
        return f"its descriptors are the server's: {sorted(taken)}"
    asked, own = _read_at_import(request.environment), _read_at_import(start.environment)
    # What the imports set here they have set in whoever asks, too.
    asked = {name: value for name, value in asked.items() if start.set_by_imports.get(name) != value}
    own = {name: value for name, value in own.items() if name not in start.set_by_imports}
    if _are_loaded(asked.get(PRELOADED_LIBRARIES, "")):
        asked.pop(PRELOADED_LIBRARIES, None)
    if differ := sorted(name for name in {*asked, *own} if asked.get(name) != own.get(name)):
        return f"imported modules have read other values of {differ}"
    importlib.invalidate_caches()
    hidden = (name for name, module in sys.modules.items() if "." not in name and _hides(request, name, module))
    if found := sorted(hidden):
        return f"its search path has others than those that are imported: {found}"
    return None


def _hides(request: Request, name: str, module: Any) -> bool:
    """Whether the request's search path has another module of this name than the one that is imported."""
    known, found = getattr(module, "__spec__", None), PathFinder.find_spec(name, request.search_path)
    return name != "sitecustomize" and None not in (known, found) and found.origin != known.origin


def _run(request: Request, passed: list[int], connection: socket.socket, start: Start) -> int:
    supervisor, process = os.getpid(), os.fork()
    if process == 0:
        connection.close()
        _be(supervisor, request, passed, start)
    for each in passed:
        os.close(each)
    while True:
        pid, status = os.waitpid(process, os.WNOHANG)
        if pid:
            _kill_session(process)
            return os.waitstatus_to_exitcode(status)
        # Nothing is sent after the request: what can be read is the end of whoever waits.
        if select.select([connection], [], [], POLL_S)[0]:
            _end(process)
            return 1


def _end(process: int) -> None:
    """Gently at first; then whatever it has started ends, too."""
    os.kill(process, signal.SIGTERM)
    until = time.monotonic() + GRACE_S
    while not os.waitpid(process, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S)
    _kill_session(process)


def _kill_session(session: int) -> None:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ValueError, ProcessLookupError):
            if os.getsid(int(entry.name)) == session:
                os.kill(int(entry.name), signal.SIGKILL)


def _be(supervisor: int, request: Request, passed: list[int], start: Start) -> NoReturn:
    status = 1
    try:
        os.setsid()
        _die_with(supervisor)
        os.setpriority(os.PRIO_PROCESS, 0, request.niceness)
        for number, descriptor in zip(request.descriptors, passed, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for number in {0, 1, 2} - set(request.descriptors):
            os.close(number)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        # A new process would draw its own.
        random.seed()
        os.environ.clear()
        os.environ.update({**request.environment, **start.set_by_imports})
        os.chdir(request.directory)
        _run_as_main(request, start)
        status = 0
    except SystemExit as ended:
        status = _exit_status(ended)
    except BaseException:
        traceback.print_exc()
    finally:
        # As an interpreter ends; not by the way out of the server.
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run_as_main(request: Request, start: Start) -> None:
    program, *rest = request.command
    main = sys.modules["__main__"] = ModuleType("__main__")
    first = {"-m": request.directory, "-c": ""}.get(program, str(Path(program).resolve().parent))
    sys.path[:] = [first, *request.search_path, *start.search_path]
    _import_sitecustomize()
    if program == "-m":
        sys.argv = rest
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
        return
    if program == "-c":
        code, sys.argv = compile(rest[0], "<string>", "exec"), ["-c", *rest[1:]]
    else:
        code, sys.argv = compile(Path(program).read_bytes(), program, "exec"), [program, *rest]
        main.__file__ = program
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    exec(code, main.__dict__)


def _import_sitecustomize() -> None:
    """As every interpreter does when it starts."""
    sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as missing:
        if missing.name != "sitecustomize":
            raise


def _exit_status(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


def _search_path(environment: Mapping[str, str]) -> list[str]:
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _search_path_of_others(started: Mapping[str, str]) -> list[str]:
    """What the interpreter and the imports have put on the search path, which is the same in every process."""
    # What both the interpreter and PYTHONPATH name, as an editable install's, is on this process's own but once.
    asked = [sys.executable, "-I", "-c", "import json, sys; print(json.dumps(sys.path))"]
    interpreters: list[str] = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
    known = {"", str(Path.cwd()), *_search_path(started), *interpreters}
    return [*interpreters, *(entry for entry in sys.path if entry not in known)]


def _are_loaded(libraries: str) -> bool:
    mapped = Path("/proc/self/maps").read_text()
    return all(str(Path(library).resolve()) in mapped for library in libraries.split(os.pathsep) if library)


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT) and name not in READ_LATER
    }


def _open_descriptors() -> set[int]:
    listed = [each.name for each in Path("/proc/self/fd").iterdir()]
    # The listing's own is no longer there.
    return {int(name) for name in listed if Path("/proc/self/fd", name).exists()}


def _threads() -> list[str]:
    """The names of all threads of this process, also of those that Python does not know."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def _die_with(parent: int) -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
