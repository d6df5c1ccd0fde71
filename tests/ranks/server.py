"""A process that imports what learners need, once, and forks their ranks from there.

    python -m tests.ranks.server PRELOAD DESCRIPTOR

`PRELOAD` is a module to import: all that is slow and reads no plan. `DESCRIPTOR` is a socket that listens already:
there `tests.ranks.launch` asks for a program to be run on some ranks. Each request has a supervisor, forked too, which
ends all ranks when one of them fails or when nobody waits for them any more. The server itself runs no kernel, starts
no thread, joins no process group, and ends with its standard input.

A rank sees what a new Python process would: the environment and search path of whoever asked, `sitecustomize` run, its
program as `__main__`. What cannot be had again by a fork is refused: a variable that an imported module may have read,
another copy of a package that is imported already.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

# Nothing that is preloaded reads these when it is imported.
MAY_DIFFER = ("FP16_PATCH", "VERL_", "PYTHONPATH", "PYTEST_")
# jemalloc's, which pyarrow brings: made for forks.
HARMLESS_THREADS = {"jemalloc_bg_thd"}
# Below those that the kernel gives to outgoing connections: one that is free stays free until rank 0 listens.
PORTS = range(20000, 32000)
GRACE_S = 5.0
POLL_S = 0.05


@dataclass(frozen=True)
class Request:
    """What to run on how many ranks, and the environment to run it in."""

    program: str
    arguments: list[str]
    ranks: int
    directory: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Start:
    """What this process was started with.

    Attributes:
        environment: before anything was imported.
        set_by_imports: variables that the imported modules have set.
        search_path: what is on it for every process of this interpreter.
    """

    environment: dict[str, str]
    set_by_imports: dict[str, str]
    search_path: list[str]


def main() -> None:
    preload, descriptor = sys.argv[1:]
    started, own_path = dict(os.environ), _search_path(os.environ)
    importlib.import_module(preload)
    threads = [name for name in _threads() if name not in HARMLESS_THREADS]
    if len(threads) > 1:
        sys.exit(f"importing {preload} started threads, which a fork would not have: {threads}")
    # Everything else that is on the path was there without anybody's asking.
    common = [entry for entry in sys.path if entry not in {"", str(Path.cwd()), *own_path}]
    start = Start(started, {name: value for name, value in os.environ.items() if started.get(name) != value}, common)
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=int(descriptor)) as listener:
        _serve(listener, start)


def _serve(listener: socket.socket, start: Start) -> None:
    poll = select.poll()
    for source in (listener.fileno(), sys.stdin.fileno()):
        poll.register(source, select.POLLIN | select.POLLHUP)
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
                server = os.getpid()
                if os.fork() == 0:
                    listener.close()
                    _supervise(server, connection, start)


def _supervise(server: int, connection: socket.socket, start: Start) -> NoReturn:
    """Run a request to its end, and report it: 0, or the exit status of the first rank that failed."""
    status = 1
    try:
        _die_with(server)
        received, (output,), _, _ = socket.recv_fds(connection, 1, 1)
        received += connection.makefile("rb").readline()
        status = _run(Request(**json.loads(received)), output, connection, start)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(b"%d\n" % status)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(request: Request, output: int, connection: socket.socket, start: Start) -> int:
    port, supervisor = _free_port(), os.getpid()
    running: dict[int, int] = {}
    for rank in range(request.ranks):
        pid = os.fork()
        if pid == 0:
            connection.close()
            _be_rank(supervisor, request, rank, port, output, start)
        os.setpgid(pid, pid)
        running[pid] = rank
    try:
        while running:
            # Nothing is sent after the request: what can be read is the end of whoever waits.
            if select.select([connection], [], [], POLL_S)[0]:
                return 1
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                rank, status = running.pop(pid), os.waitstatus_to_exitcode(ended)
                if status != 0:
                    os.write(output, f"rank {rank} ended with {status}; the others are stopped\n".encode())
                    return status if status > 0 else 128 - status
        return 0
    finally:
        _end(running)


def _end(running: dict[int, int]) -> None:
    """End ranks and what they started, gently at first."""
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)
    until = time.monotonic() + GRACE_S
    while running and time.monotonic() < until:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        running.pop(pid, None)
        time.sleep(POLL_S)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _be_rank(supervisor: int, request: Request, rank: int, port: int, output: int, start: Start) -> NoReturn:
    status = 1
    try:
        _die_with(supervisor)
        # A new process would draw its own.
        random.seed()
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        _take_environment(request, start, rank, port)
        os.chdir(request.directory)
        _take_search_path(request, start)
        sys.argv = [request.program, *request.arguments]
        runpy.run_path(request.program, run_name="__main__")
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
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _exit_status(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


def _take_environment(request: Request, start: Start, rank: int, port: int) -> None:
    asked, own = _that_may_be_read(request.environment), _that_may_be_read(start.environment)
    differ = {name for name in {*asked, *own} if asked.get(name) != own.get(name)}
    if differ:
        raise RuntimeError(f"other values when the rank server's modules were imported: {sorted(differ)}")
    os.environ.clear()
    os.environ.update(
        request.environment,
        **start.set_by_imports,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(request.ranks),
        LOCAL_WORLD_SIZE=str(request.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _that_may_be_read(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(MAY_DIFFER)}


def _take_search_path(request: Request, start: Start) -> None:
    asked = _search_path(request.environment)
    sys.path[:] = [str(Path(request.program).parent), *asked, *start.search_path]
    importlib.invalidate_caches()
    hidden = sorted(name for name, module in sys.modules.items() if "." not in name and _is_hidden(name, module, asked))
    if hidden:
        raise RuntimeError(f"the rank server imported others than those on this search path: {hidden}")
    # As every interpreter does when it starts.
    sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as missing:
        if missing.name != "sitecustomize":
            raise


def _is_hidden(name: str, module: Any, search_path: list[str]) -> bool:
    """Whether the search path has another module of this name than the one that is imported."""
    known, found = getattr(module, "__spec__", None), PathFinder.find_spec(name, search_path)
    return name != "sitecustomize" and None not in (known, found) and found.origin != known.origin


def _search_path(environment: Any) -> list[str]:
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def _threads() -> list[str]:
    """The names of all threads of this process, also of those that Python does not know."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def _free_port() -> int:
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _die_with(parent: int) -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
