"""Check whether Prometheus has data for each line of the dashboard; names those without and exits with 1.

python -m integration.recipes.check_dashboard http://localhost:9090
python -m integration.recipes.check_dashboard http://localhost:9090 'my-run.*'
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from integration.bench.command import SMOKE_HELP
from integration.recipes.dashboard import DASHBOARD

TIMEOUT_S = 10.0
POINTS = 720


def without_data(
    prometheus: str, dashboard: dict[str, Any], run: str = ".+", minutes: float = 60.0
) -> list[tuple[str, str]]:
    """List (panel's title, PromQL) of each expression with no number in the last `minutes`.

    Some have none by right: the critic's where there is no critic, alerts where none stood, the loss scale without a
    scaler.

    Args:
        prometheus: base URL of the server.
        dashboard: Grafana's model of it.
        run: regular expression of the runs to look at, in place of the dashboard's variable.

    Raises:
        urllib.error.HTTPError: Prometheus refuses an expression; its answer says why.
    """
    return [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
        if not has_data(prometheus, target["expr"].replace("$run", run), minutes)
    ]


def has_data(prometheus: str, expression: str, minutes: float = 60.0) -> bool:
    """Whether the expression had a number at some time of the last `minutes`."""
    end, seconds = time.time(), minutes * 60
    query = {"query": expression, "start": end - seconds, "end": end, "step": max(1.0, seconds / POINTS)}
    url = f"{prometheus.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        found = json.load(answer)["data"]["result"]
    return any(not math.isnan(float(value)) for series in found for _, value in series["values"])


class _OneValue(BaseHTTPRequestHandler):
    """Answers every query as a Prometheus that has one value."""

    def do_GET(self) -> None:
        answer = json.dumps({"data": {"result": [{"values": [[time.time(), "1"]]}]}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def stand_in() -> Iterator[str]:
    """Yield the URL of a server that answers as a Prometheus with data for everything."""
    with HTTPServer(("127.0.0.1", 0), _OneValue) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def check(prometheus: str, run: str) -> bool:
    """Print the lines of the dashboard that have no data; whether there is none such."""
    missing = without_data(prometheus, json.loads(DASHBOARD.read_text(encoding="utf-8")), run)
    for title, expression in missing:
        print(f"{title}: no data for {expression}")
    return not missing


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus", nargs="?", default="http://localhost:9090", help="default: %(default)s")
    parser.add_argument("run", nargs="?", default=".+", help="regular expression of the runs to look at; default: all")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_HELP}: asks a stand-in for Prometheus")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        with stand_in() as url:
            sys.exit(not check(url, arguments.run))
    sys.exit(not check(arguments.prometheus, arguments.run))


if __name__ == "__main__":
    main()
