"""Put verl's Megatron learner through FP16 training in every layout of two ranks, on both bridges: one cell each.

    python -m integration.matrix.megatron [--cell NAME] [--again]

A cell is real verl and real Megatron on gloo ranks, put through scenarios of `tests/verl/megatron/learner.py`. Cells
share their processes until one stops them. What a cell found is written to `out/megatron.json` as soon as it has ended,
so that a run that was stopped goes on from there: how far log-probs are from those of transformers, whether a
skip, a retry and a resumed run were as they must be, how far exported weights score from the learner, seconds, and
where a cell stopped, and why. `--smoke` runs one cell and keeps nothing.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from integration.bench.command import parser, results_folder
from integration.bench.ranks import cpu_environment
from integration.cpu.launch import MEGATRON_ENVIRONMENT
from integration.cpu.process import die_with_parent
from integration.cpu.tiny_families import write_family
from integration.cpu.tiny_model import make_random_model
from integration.cpu.warm.servers import IMPORTS, of_this_process
from integration.matrix.megatron_table import RESULTS
from integration.matrix.versions import ROOT

LEARNER = ROOT / "tests" / "verl" / "megatron" / "learner.py"
POLL_S = 1.0
END_OF_LOG = 6000
ENVIRONMENT = {
    **MEGATRON_ENVIRONMENT,
    "VERL_USE_EXTERNAL_MODULES": f"{MEGATRON_ENVIRONMENT['VERL_USE_EXTERNAL_MODULES']},fp16_patch.autoload",
    "FP16_PATCH": "fp16",
    "FP16_PATCH_INIT_SCALE": "65536",
}
BRIDGES = {"mbridge": "mbridge", "megatron-bridge": "megatron-bridge"}
"""A bridge, and the package that it is."""
TRAINED = ("built", "skipped", "retried", "exported", "resumed")
# verl sends no weights of a critic anywhere.
CRITIC = ("built", "skipped", "retried", "resumed")


@dataclass(frozen=True)
class Cell:
    """A model on a layout of ranks.

    Attributes:
        model: `dense`, or `moe`, a mixture of experts.
        layout: one of the learner's.
        options: of the learner, besides those that follow from model and bridge.
        scenarios: of the learner, in this order.
        label: says what is special, in place of layout and options.
    """

    model: str
    layout: str
    bridge: str
    ranks: int = 2
    options: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = TRAINED
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.model} {self.label or self.layout} {self.bridge}"

    @property
    def where(self) -> str:
        """As the learner is told."""
        of_model = ("mixture",) if self.model == "moe" else ()
        of_bridge = ("bridged",) if self.bridge == "megatron-bridge" else ()
        return "+".join((self.layout, *of_model, *of_bridge, *self.options))


@dataclass(frozen=True)
class Cause:
    """Why a cell does not run; `says` is found in what its ranks print."""

    says: str
    because: str


CAUSES = (
    Cause(
        r"Weights \{'lm_head.weight'\} not found",
        "mbridge 0.15.1 looks for the head's weight in a checkpoint even where a value's takes its place; one "
        "with tied embeddings has none, the mixture's has",
    ),
    Cause(
        "LoRA/PEFT only supported via Megatron-Bridge", "verl trains adapters with Megatron-Bridge only, and says so"
    ),
    Cause(
        r"IndexError: shape mismatch: indexing tensors could not be broadcast.*\[11\], \[23\]",
        "mbridge 0.15.1 builds such heads for MiMo and DeepSeek-V3 only, and the head's loss is computed without one",
    ),
    Cause(
        "cannot import name 'create_peft' from 'megatron.bridge.peft.utils'",
        "verl 0.9.1 imports `create_peft`, which Megatron-Bridge 0.3.1, the newest for Python 3.11, does not have",
    ),
    Cause(
        "'NoneType' object has no attribute 'megatron_module'",
        "Megatron-Bridge 0.3.1 has no names for the weights of such a head in Qwen2",
    ),
    Cause(
        "Unknown parallelism type: None",
        "with tied embeddings Megatron-Bridge 0.3.1 cannot save a value head; training, skip and retry run, and the "
        "mixture's, without ties, is saved",
    ),
    Cause(
        "Output layer not found",
        "with tied embeddings Megatron-Bridge 0.3.1 looks for the head in the first of a rank's chunks, and it lies in "
        "the last, so weights are not loaded; without ties, as in the mixture here, they are",
    ),
)


def cells() -> Iterator[Cell]:
    """The grid; those that share their processes one after the other."""
    for bridge in BRIDGES:
        for layout in ("dp", "tp", "pp", "vpp", "cp"):
            yield Cell("dense", layout, bridge)
        for layout in ("ep", "dp", "tp", "pp", "vpp", "cp"):
            yield Cell("moe", layout, bridge)
        yield Cell("dense", "dp", bridge, options=("offload",), label="dp, offload")
        for model in ("dense", "moe"):
            yield Cell(model, "tp", bridge, options=("value_model",), scenarios=CRITIC, label="tp, value model")
        yield Cell("dense", "tp", bridge, scenarios=("reference",), label="tp, reference")
        yield Cell("dense", "dp", bridge, options=("lora",), label="dp, LoRA")
        yield Cell("dense", "tp", bridge, options=("lora",), label="tp, LoRA")
        yield Cell("dense", "dp", bridge, options=("mtp",), label="dp, MTP head")
    for bridge in BRIDGES:
        yield Cell("dense", "dp", bridge, ranks=1, label="one rank")
    yield Cell("moe", "dp", "mbridge", ranks=1, label="one rank")


def run(together: Sequence[Cell], models: Mapping[str, Path], work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run cells on the same ranks, up to the first that stops; yield each cell's name and result when it has ended."""
    work.mkdir(parents=True)
    environment = cpu_environment(ENVIRONMENT)
    interpreter = of_this_process().server(IMPORTS, environment).interpreter
    launch = [sys.executable, "-m", "integration.cpu.warm.ranks", str(interpreter), str(together[0].ranks)]
    asked = [f"{cell.where}:{','.join(cell.scenarios)}" for cell in together]
    settings = ["--model", str(models["dense"]), "--mixture", str(models["moe"]), "--out", str(work), "--last-rank"]
    log, facts = work / "log.txt", work / "facts.json"
    with log.open("w") as printed:
        ranks = subprocess.Popen(
            [*launch, str(LEARNER), *settings, *asked],
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        for cell in together:
            while not (found := _facts_of(cell, facts)).keys() >= set(cell.scenarios) and ranks.poll() is None:
                time.sleep(POLL_S)
            stopped = None
            if not (found := _facts_of(cell, facts)).keys() >= set(cell.scenarios):
                text = log.read_text(errors="replace")
                print(text[-END_OF_LOG:], file=sys.stderr)
                stopped = why_stopped(cell, found, text)
            yield cell.name, {**judged(found), "stopped": stopped, "releases": releases(cell)}
            if stopped:
                break
        ranks.wait()


def _facts_of(cell: Cell, facts: Path) -> dict[str, Any]:
    found = json.loads(facts.read_text()) if facts.is_file() else {}
    return dict(found.get(cell.where, {}))


def releases(cell: Cell) -> dict[str, str]:
    return {name: version(name) for name in ("verl", "megatron-core", BRIDGES[cell.bridge], "torch", "transformers")}


def why_stopped(cell: Cell, facts: Mapping[str, Any], log: str) -> dict[str, str | None]:
    """The scenario that did not end, its first error, and the cause, if it is known."""
    scenario = next(name for name in cell.scenarios if name not in facts)
    errors = re.findall(
        r"^(?:\[rank\d+\]: *)?(\w*(?:\.\w+)*(?:Error|Exception|Collapse|Conflict)\b.*)$", log, re.MULTILINE
    )
    cause = next((cause.because for cause in CAUSES if re.search(cause.says, log)), None)
    # Where an environment lies says nothing of the cause.
    said = re.sub(r" (?:in |\()/[^\s)]+\)?", "", errors[0] if errors else log[-300:])
    return {"in": scenario, "error": said[:300], "because": cause}


def judged(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a scenario's facts come to: figures, and whether they are as they must be. None: not seen."""
    built = facts.get("built") or facts.get("reference") or {}
    exported = facts.get("exported")
    return {
        "dtypes": built.get("parameters"),
        "error": next((built[name] for name in ("log_prob_error", "value_error") if name in built), None),
        "skip": skipped_well(facts["skipped"]) if "skipped" in facts else None,
        "retry": retried_well(facts["retried"]) if "retried" in facts else None,
        "export": exported and exported["log_prob_error"],
        "resume": resumed_well(facts["resumed"]) if "resumed" in facts else None,
        "seconds": round(sum(facts.get("seconds", {}).values()), 1),
    }


def skipped_well(facts: Mapping[str, Any]) -> bool:
    """Whether a gradient of one rank that overflows at every scale changed nothing, and was told of."""
    return all(
        not any(found["errors"])
        and found["unchanged_on_every_rank"]
        and found["moved_by_a_clean_step"]
        and found["scales"] == [scale / 2 for scale in _values(found["metrics"][0], "fp16/loss_scale/min")]
        and _values(found["metrics"][1], "fp16/step_skipped") == {1.0}
        for found in facts.values()
    )


def retried_well(facts: Mapping[str, Any]) -> bool:
    """Whether updates that were tried again are bit for bit those of a clean run at the scale they end at."""
    runs = [found for found in facts.values() if isinstance(found, dict)]
    return bool(facts["dropout_matters"]) and all(
        all(found["same"].values()) and found["found"]["computed"] > found["clean"]["computed"] for found in runs
    )


def resumed_well(facts: Mapping[str, Any]) -> bool:
    """Whether a resumed run has the saved scale, counters, schedule and state, and its next step is the same."""
    return (
        not any(facts["errors"])
        and facts["saved"] == facts["resumed"]
        and facts["steps"][0] == facts["steps"][1]
        and facts["same_state"]
        and facts["same_next_state"]
    )


def _values(metrics: Mapping[str, Any], name: str) -> set[float]:
    """Of a metric, from each rank that has one."""
    return {value for [value] in metrics[name]}


def make_models(folder: Path) -> dict[str, Path]:
    """Random models whose heads, layers and experts two ranks can share, also in two parts each."""
    folder.mkdir(parents=True)
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2, "norm_topk_prob": True}
    return {
        "dense": make_random_model(folder / "dense"),
        "moe": write_family("qwen3_moe", folder / "moe", **sizes),
    }


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, out=RESULTS.parent)
    made.add_argument("--cell", action="append", metavar="NAME", help="this one only, run again; may be repeated")
    made.add_argument("--again", action="store_true", help="also those that have been run")
    arguments = made.parse_args(argv)
    named = {cell.name: cell for cell in cells()}
    if unknown := set(arguments.cell or ()) - named.keys():
        made.error(f"no cell {', '.join(unknown)}; there are {', '.join(named)}")
    with results_folder(arguments.out, smoke=arguments.smoke) as out:
        _fill(out, list(named)[:1] if arguments.smoke else arguments.cell, named, again=arguments.again)


def _fill(out: Path, asked: list[str] | None, named: Mapping[str, Cell], *, again: bool) -> None:
    path = out / RESULTS.name
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wanted = [cell for name, cell in named.items() if (name in asked if asked else again or name not in found)]
    with tempfile.TemporaryDirectory(prefix="fp16_patch_grid_") as folder:
        models = make_models(Path(folder, "models"))
        for number in itertools.count():
            if not wanted:
                break
            ranks = wanted[0].ranks
            alike = [cell for cell in wanted if cell.ranks == ranks]
            for name, ended in run(alike, models, Path(folder, str(number))):
                found[name] = ended
                wanted.remove(named[name])
                # In the grid's order, whatever was run last.
                kept = {name: found[name] for name in named if name in found}
                path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
                print(f"{name}: {json.dumps(ended)}", flush=True)


if __name__ == "__main__":
    main()
