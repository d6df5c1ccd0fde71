"""Does Prometheus have data for the dashboard? ``python -m integration.recipes.check_dashboard http://localhost:9090``"""

from __future__ import annotations

import json
import math
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

from integration.recipes.dashboard import DASHBOARD

TIMEOUT_S = 10.0
POINTS = 720


def without_data(
    prometheus: str, dashboard: dict[str, Any], run: str = ".+", minutes: float = 60.0
) -> list[tuple[str, str]]:
    """(panel's title, PromQL) for each expression with no number in the last ``minutes``.

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
    """Whether the expression had a number at some time of the last ``minutes``."""
    end, seconds = time.time(), minutes * 60
    query = {"query": expression, "start": end - seconds, "end": end, "step": max(1.0, seconds / POINTS)}
    url = f"{prometheus.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        found = json.load(answer)["data"]["result"]
    return any(not math.isnan(float(value)) for series in found for _, value in series["values"])


def main(prometheus: str, run: str = ".+") -> None:
    missing = without_data(prometheus, json.loads(DASHBOARD.read_text(encoding="utf-8")), run)
    for title, expression in missing:
        print(f"{title}: no data for {expression}")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main(*sys.argv[1:])
