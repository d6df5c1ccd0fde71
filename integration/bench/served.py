"""A Python process that answers questions, line by line, until whoever asks closes it or ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

_ANSWER = "answer "
# Python's `-c`: calls a `module:function` with the other arguments.
CALL = "import sys; from integration.bench.served import called; called(*sys.argv[1:])"
END_OF_LOG = 6000
END_S = 60.0


class Served:
    """The asker's end. The process may start while others do: the first question waits for it.

    Args:
        work: `module:function` that the process calls with the arguments; it has to iterate over `questions` and `say`
            an answer to each.
        environment: of the process.
        log: gets all it prints besides.
        python: what runs it, such as the interpreter of a warm server.
    """

    def __init__(
        self,
        work: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        python: str = sys.executable,
    ) -> None:
        self._work, self._log = work, log
        with log.open("w") as printed:
            self._process = subprocess.Popen(
                [python, "-c", CALL, work, *arguments],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
            )

    def ask(self, question: Any) -> Any:
        """Return the answer to a question; both are what JSON can hold.

        Raises:
            RuntimeError: the process ended without an answer; the end of its log.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        raise RuntimeError(f"{self._work} ended:\n{self._log.read_text(errors='replace')[-END_OF_LOG:]}")

    def close(self) -> None:
        """Let the process end, and end it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


def called(work: str, *arguments: Any) -> Any:
    """Call a `module:function`, and return what it returns."""
    module, _, function = work.partition(":")
    return getattr(import_module(module), function)(*arguments)


def questions() -> Iterator[Any]:
    """Yield what is asked, in the process that is asked; ends with the asker."""
    for line in sys.stdin:
        yield json.loads(line)


def say(answer: Any) -> None:
    """Answer the question."""
    print(_ANSWER + json.dumps(answer), flush=True)
