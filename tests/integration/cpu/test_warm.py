"""Processes that start warm, and ranks of them: what they see, how they end, and that nothing of them stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from integration.cpu.warm.servers import WarmServers
from tests.ranks import Facts, Ranks

ROOT = Path(__file__).parents[3]
# Any module will do where no program needs torch.
PRELOAD = "json.tool"


@pytest.fixture(scope="module")
def servers() -> Iterator[WarmServers]:
    with WarmServers() as servers:
        yield servers


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def ran(servers: WarmServers, environment: dict[str, str], tmp_path: Path) -> Callable[..., Facts]:
    """The facts that a program leaves."""

    def run(source: str, ranks: int = 1, **more: str) -> Facts:
        program = tmp_path / "program.py"
        program.write_text(dedent(source))
        return Ranks(servers).facts(program, [str(tmp_path)], ranks, tmp_path, {**environment, **more}, PRELOAD)

    return run


def pids(out: Path) -> list[int]:
    return [int(path.name) for path in (out / "pids").iterdir()]


def is_gone(pid: int) -> bool:
    try:
        return "(zombie)" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def test_a_rank_sees_what_a_new_process_would(ran: Callable[..., Facts], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import os; os.environ['STARTED'] = 'yes'")
    source = """
        import json, os, sys
        from pathlib import Path
        out = Path(sys.argv[1])
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "FP16_PATCH", "STARTED")
        facts = {name: os.environ.get(name) for name in names}
        if __name__ == "__main__" and facts["RANK"] == "1":
            (out / "facts.json").write_text(json.dumps({**facts, "path": sys.path[:2], "directory": os.getcwd()}))
    """
    search_path = f"{tmp_path / 'own'}{os.pathsep}{ROOT}"
    facts = ran(source, ranks=2, FP16_PATCH="1", PYTHONPATH=search_path)
    assert facts == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "FP16_PATCH": "1",
        "STARTED": "yes",
        "path": [str(tmp_path), str(tmp_path / "own")],
        "directory": str(Path.cwd()),
    }


def test_a_plan_stays_with_the_ranks_that_have_it(ran: Callable[..., Facts]) -> None:
    source = """
        import json, os, sys
        from pathlib import Path
        Path(sys.argv[1], "facts.json").write_text(json.dumps(os.environ.get("FP16_PATCH")))
    """
    assert [ran(source, FP16_PATCH="1"), ran(source)] == ["1", None]


def test_a_rank_that_fails_ends_the_others_and_is_told_with_the_log(ran: Callable[..., Facts], tmp_path: Path) -> None:
    source = """
        import os, sys, time
        from pathlib import Path
        Path(sys.argv[1], "pids").mkdir(exist_ok=True)
        Path(sys.argv[1], "pids", str(os.getpid())).touch()
        while len(list(Path(sys.argv[1], "pids").iterdir())) < 2:
            time.sleep(0.01)
        if os.environ["RANK"] == "1":
            raise ValueError("no such thing")
        time.sleep(600)
    """
    started = time.monotonic()
    with pytest.raises(AssertionError, match="ValueError: no such thing(.|\n)*rank 1 ended with 1"):
        ran(source, ranks=2)
    assert time.monotonic() - started < 60
    assert len(pids(tmp_path)) == 2
    eventually(lambda: all(map(is_gone, pids(tmp_path))))


def test_a_rank_that_is_killed_is_a_failure(ran: Callable[..., Facts]) -> None:
    with pytest.raises(AssertionError, match="rank 0 ended with -9"):
        ran("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


def test_ranks_that_hang_end_with_whoever_waits_for_them(
    servers: WarmServers, environment: dict[str, str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        dedent(
            """
            import os, signal, sys, time
            from pathlib import Path
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path(sys.argv[1], "pids").mkdir(exist_ok=True)
            Path(sys.argv[1], "pids", str(os.getpid())).touch()
            time.sleep(600)
            """
        )
    )
    interpreter = servers.server(PRELOAD, environment).interpreter
    launch = [sys.executable, "-m", "integration.cpu.warm.ranks", str(interpreter), "2", str(program), str(tmp_path)]
    waiting = subprocess.Popen(launch, env=environment)
    eventually(lambda: (tmp_path / "pids").is_dir() and len(pids(tmp_path)) == 2)
    waiting.kill()
    waiting.wait()
    eventually(lambda: all(map(is_gone, pids(tmp_path))))


def test_a_process_ends_with_its_server(environment: dict[str, str]) -> None:
    source = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with WarmServers() as servers:
        server = servers.server(PRELOAD, environment)
        command = [server.interpreter, "-u", "-c", source]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            server.process.kill()
    assert process.returncode == 1
    eventually(lambda: is_gone(pid))


def test_what_a_process_has_started_ends_with_it(servers: WarmServers, environment: dict[str, str]) -> None:
    source = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    assert is_gone(int(output_of(servers, environment, "-c", source)))


def test_processes_that_multiprocessing_spawns_start_warm_too(
    servers: WarmServers, environment: dict[str, str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        dedent(
            """
            import multiprocessing, os, sys

            def answer(connection):
                connection.send(("json.tool" in sys.modules, os.getpid()))
                connection.recv()
                sys.exit(3)

            if __name__ == "__main__":
                context = multiprocessing.get_context("spawn")
                own, its = context.Pipe()
                process = context.Process(target=answer, args=(its,))
                process.start()
                its.close()
                preloaded, pid = own.recv()
                own.send("end")
                process.join()
                print(preloaded, pid != process.pid, process.exitcode)
            """
        )
    )
    assert output_of(servers, environment, str(program)).split() == ["True", "True", "3"]


def test_exit_status_and_input_are_those_of_the_process(servers: WarmServers, environment: dict[str, str]) -> None:
    interpreter = servers.server(PRELOAD, environment).interpreter
    for source, status in (
        ("import sys; sys.exit(len(sys.stdin.read()))", 3),
        ("import sys; sys.exit('no')", 1),
        ("raise ValueError", 1),
        ("import os; os.kill(os.getpid(), 15)", -15),
    ):
        ended = subprocess.run([interpreter, "-c", source], input=b"abc", env=environment, capture_output=True)
        assert ended.returncode == status, ended.stderr


def output_of(servers: WarmServers, environment: dict[str, str], *arguments: str) -> str:
    command = [servers.server(PRELOAD, environment).interpreter, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


IS_WARM = "import sys; print('json.tool' in sys.modules)"


@pytest.mark.parametrize("options", [("-I",), ("-X", "dev")])
def test_options_that_are_not_known_start_cold(
    servers: WarmServers, environment: dict[str, str], options: tuple[str, ...]
) -> None:
    assert output_of(servers, environment, "-u", "-c", IS_WARM) == "True\n"
    assert output_of(servers, environment, *options, "-c", IS_WARM) == "False\n"


def test_another_value_of_what_imported_modules_have_read_starts_cold(
    servers: WarmServers, environment: dict[str, str]
) -> None:
    interpreter = servers.server(PRELOAD, environment).interpreter
    for more, warm in (({"VLLM_LOGGING_LEVEL": "WARN"}, "True\n"), ({"OMP_NUM_THREADS": "3"}, "False\n")):
        command = [interpreter, "-c", IS_WARM]
        assert subprocess.check_output(command, env={**environment, **more}, text=True) == warm
    assert "have read other values of ['OMP_NUM_THREADS']" in servers.server(PRELOAD, environment).log.read_text()


def test_what_imports_have_set_comes_back_warm(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sets_here.py").write_text("import os; os.environ['OMP_OF_IMPORTS'] = 'set'")
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    with WarmServers() as servers:
        interpreter = servers.server("sets_here", environment).interpreter
        for value, warm in (("set", "True\n"), ("other", "False\n")):
            command = [interpreter, "-c", "import sys; print('sets_here' in sys.modules)"]
            own = {**environment, "OMP_OF_IMPORTS": value}
            assert subprocess.check_output(command, env=own, text=True) == warm


def test_a_library_that_is_loaded_already_may_be_preloaded(
    servers: WarmServers, environment: dict[str, str], tmp_path: Path
) -> None:
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    loaded = next(Path(path) for path in mapped if path.endswith("/libm.so.6"))
    other = Path(shutil.copy(loaded, tmp_path / "libother.so"))
    interpreter = servers.server(PRELOAD, environment).interpreter
    for library, warm in ((loaded, "True\n"), (other, "False\n")):
        own = {**environment, "LD_PRELOAD": str(library)}
        assert subprocess.check_output([interpreter, "-c", IS_WARM], env=own, text=True) == warm


def test_the_first_free_descriptor_is_the_process_s_own(servers: WarmServers, environment: dict[str, str]) -> None:
    interpreter = servers.server(PRELOAD, environment).interpreter
    command = ["sh", "-c", 'exec "$0" -c "$1" 3</dev/null', interpreter, IS_WARM]
    assert subprocess.check_output(command, env=environment, text=True) == "True\n"


def test_the_search_path_is_that_of_a_new_process(
    servers: WarmServers, environment: dict[str, str], tmp_path: Path
) -> None:
    # An editable install's folder is on the server's own PYTHONPATH as well.
    interpreter = servers.server(PRELOAD, environment).interpreter
    del environment["PYTHONPATH"]
    cold, warm = (
        subprocess.check_output([python, "-c", "import sys; print(sys.path)"], env=environment, cwd=tmp_path)
        for python in (sys.executable, interpreter)
    )
    assert warm == cold


def test_another_copy_of_what_is_imported_starts_cold(environment: dict[str, str], tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "preloaded_here.py").write_text(f"where = {name!r}")
    environment["PYTHONPATH"] = f"{tmp_path / 'first'}{os.pathsep}{ROOT}"
    command = ["-c", "import preloaded_here; print(preloaded_here.where)"]
    with WarmServers() as servers:
        server = servers.server("preloaded_here", environment)
        assert subprocess.check_output([server.interpreter, *command], env=environment, text=True) == "first\n"
        environment["PYTHONPATH"] = f"{tmp_path / 'second'}{os.pathsep}{environment['PYTHONPATH']}"
        assert subprocess.check_output([server.interpreter, *command], env=environment, text=True) == "second\n"


def test_a_server_whose_imports_start_threads_serves_nobody(environment: dict[str, str], tmp_path: Path) -> None:
    source = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    (tmp_path / "threaded.py").write_text(source)
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    with WarmServers() as servers:
        server = servers.server("threaded", environment)
        assert subprocess.check_output([server.interpreter, "-c", "print(1)"], env=environment, text=True) == "1\n"
        assert server.process.wait(30) == 1
        assert "importing threaded started threads" in server.log.read_text()
