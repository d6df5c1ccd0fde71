"""The page in a real browser, where there is one: a run that is switched off goes from every chart."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("plotly")

from fp16_patch.mismatch.record.reading import load_run
from fp16_patch.mismatch.report.page import write_html
from tests.mismatch.report.test_report import rewrite, uneven_stats, write_record

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--virtual-time-budget=8000",
    "--window-size=1400,1000",
    "--dump-dom",
)

# Acts as a reader does, and leaves what the page shows after each act.
READER = """
<script>
(async () => {
  const settled = () => new Promise((done) => setTimeout(done, 600));
  const shown = () => Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [
    plot.getAttribute("aria-label"),
    plot.closest("figure").hidden ? [] : [...new Set(plot.data.filter((trace) => trace.visible !== "legendonly")
      .map((trace) => trace.legendgroup ?? trace.name))].sort(),
  ]));
  const press = (element) => {
    for (const kind of ["mousedown", "mouseup"]) element.dispatchEvent(new MouseEvent(kind, { bubbles: true }));
  };
  const pressed = () => [...document.querySelectorAll("button.run")].map((button) => button.ariaPressed);
  const first = document.querySelector(".plot");
  const found = { all: shown() };
  document.querySelector('button.run[data-run="bf16"]').click();
  await settled();
  Object.assign(found, { withoutBf16: shown(), pressed: pressed() });
  press(first.querySelectorAll(".legendtoggle")[0]);
  await settled();
  found.again = shown();
  press(first.querySelectorAll(".legendtoggle")[1]);
  await settled();
  Object.assign(found, { withoutFp16: shown(), scales: [first.layout.yaxis.type] });
  first.closest("figure").querySelector('[data-scale="linear"]').click();
  await settled();
  found.scales.push(first.layout.yaxis.type);
  found.requests = performance.getEntriesByType("resource").length;
  const answer = document.createElement("pre");
  answer.id = "found";
  answer.textContent = JSON.stringify(found);
  document.body.append(answer);
})();
</script>
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    runs = {}
    for name, scale in (("bf16", 1e-2), ("fp16", 1e-3)):
        record = write_record(tmp_path / name)
        rewrite(record, 1, stats=uneven_stats(scale))
        runs[name] = load_run(record)
    write_html(runs, tmp_path / "page.html")
    return tmp_path / "page.html"


def acted_on(page: Path, folder: Path) -> dict[str, Any]:
    whole = page.read_text(encoding="utf-8")
    page.write_text(whole.replace("</body>", READER + "</body>"), encoding="utf-8")
    command = [str(BROWSER), *QUIET, f"--user-data-dir={folder}", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', shown)
    found: dict[str, Any] = json.loads(html.unescape(text))
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_run_is_switched_off_in_every_chart(page: Path, tmp_path: Path) -> None:
    found = acted_on(page, tmp_path / "profile")
    everywhere, maps = found["all"], [title for title in found["all"] if " against " in title]

    assert len(maps) == 4
    assert all(everywhere[title] == ["bf16", "fp16"] for title in everywhere if title not in maps)
    for act, hidden in (("withoutBf16", "bf16"), ("withoutFp16", "fp16")):
        assert found[act] == {title: [run for run in runs if run != hidden] for title, runs in everywhere.items()}
    assert found["pressed"] == ["false", "true"]
    assert found["again"] == everywhere
    assert found["scales"] == ["log", "linear"]
    assert found["requests"] == 0
