"""Programs on forked ranks: what they see, how they fail, and that nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.ranks.servers import Facts, RankServers

ROOT = Path(__file__).parents[2]
# Any module will do where no program needs torch.
PRELOAD = "json.tool"


@pytest.fixture(scope="module")
def servers() -> Iterator[RankServers]:
    with RankServers() as servers:
        yield servers


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    # It changes between the phases of a test.
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def ran(servers: RankServers, environment: dict[str, str], tmp_path: Path) -> Callable[..., Facts]:
    """The facts that a program leaves."""

    def run(source: str, ranks: int = 1, **more: str) -> Facts:
        program = tmp_path / "program.py"
        program.write_text(dedent(source))
        return servers.facts(program, [str(tmp_path)], ranks, tmp_path, {**environment, **more}, PRELOAD)

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
    servers: RankServers, environment: dict[str, str], tmp_path: Path
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
    server = servers.server(PRELOAD, environment)
    launch = [sys.executable, "-m", "tests.ranks.launch", str(server.path), "2", str(program), str(tmp_path)]
    waiting = subprocess.Popen(launch, env=environment)
    eventually(lambda: (tmp_path / "pids").is_dir() and len(pids(tmp_path)) == 2)
    waiting.kill()
    waiting.wait()
    eventually(lambda: all(map(is_gone, pids(tmp_path))))


def test_ranks_end_with_their_server(environment: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"import time; from pathlib import Path; Path('{tmp_path}/started').touch(); time.sleep(600)")
    with RankServers() as servers:
        server = servers.server(PRELOAD, environment)
        launch = [sys.executable, "-m", "tests.ranks.launch", str(server.path), "1", str(program)]
        with subprocess.Popen(launch, env=environment, stderr=subprocess.PIPE, text=True) as waiting:
            eventually((tmp_path / "started").exists)
            server.process.kill()
            assert waiting.stderr is not None
            assert "the rank server is gone" in waiting.stderr.read()
    assert waiting.returncode == 1


def test_a_variable_that_an_imported_module_may_have_read_is_refused(ran: Callable[..., Facts]) -> None:
    ran("import sys; open(f'{sys.argv[1]}/facts.json', 'w').write('1')")
    with pytest.raises(AssertionError, match=r"rank server's modules were imported: \['OMP_NUM_THREADS'\]"):
        ran("", OMP_NUM_THREADS="3")


def test_a_copy_of_what_is_imported_already_is_refused(
    servers: RankServers, environment: dict[str, str], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "preloaded_here.py").touch()
    program = tmp_path / "program.py"
    program.touch()
    first = f"{tmp_path / 'first'}{os.pathsep}{ROOT}"
    second = ["env", f"PYTHONPATH={tmp_path / 'second'}{os.pathsep}{first}"]
    with pytest.raises(AssertionError, match=r"others than those on this search path: \['preloaded_here'\]"):
        servers.facts(program, [], 1, tmp_path, {**environment, "PYTHONPATH": first}, "preloaded_here", second)


def test_a_preload_that_starts_threads_is_refused(
    servers: RankServers, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    with pytest.raises(AssertionError, match="importing threaded started threads"):
        servers.facts(tmp_path / "program.py", [], 1, tmp_path, environment, "threaded")
