"""`fp16-patch analyze`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from fp16_patch.cli.group import Failure
from fp16_patch.cli.options import FormerlyOption, InputPath, OutputFile, check_folder, print_text, writing
from fp16_patch.cli.runs import require_for_page, show


@click.command("analyze")
@click.argument("files", nargs=-1, required=True, type=InputPath(), metavar="FILE...")
@click.option("--html", type=OutputFile(), help="Write a self-contained page with plots here.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON instead of the table.")
@click.option("--sampler-key", help="Name of the sampler's log-probs in FILE, where it is none of the known ones.")
@click.option("--learner-key", help="Name of the learner's log-probs, likewise.")
@click.option(
    "--tokenizer",
    metavar="FOLDER",
    type=InputPath(),
    help="Name the worst tokens by this tokenizer.",
)
@click.option(
    "--output",
    cls=FormerlyOption,
    formerly=["--out"],
    metavar="FOLDER",
    type=InputPath(),
    help="Write a run record here, for `report`; of several FILEs, one a folder.",
)
@click.pass_context
def command(
    ctx: click.Context,
    files: tuple[Path, ...],
    html: Path | None,
    as_json: bool,
    sampler_key: str | None,
    learner_key: str | None,
    tokenizer: Path | None,
    output: Path | None,
) -> None:
    """Compare sampler and learner from log-probs in JSON lines.

    FILE holds the log-probs of each token, as any trainer may have written them, one line a sequence or, with lists of
    lists, a batch:

    \b
    {"step": 0, "sampler_log_probs": [-0.1, …], "learner_log_probs": [-0.2, …],
     "mask": [1, …], "token_ids": [17, …]}

    step, mask and token_ids may be left out; null and NaN are non-finite. The names of verl, OpenRLHF, slime, TRL,
    ms-swift, NeMo-RL, prime-rl, AReaL, SkyRL and open-instruct are known as well. FILE may be a .jsonl, a .jsonl.gz, or
    a directory of them. Several are set side by side.

    \b
    Examples:
      fp16-patch analyze log_probs.jsonl
      fp16-patch analyze bf16.jsonl.gz fp16.jsonl.gz --html compare.html
      fp16-patch analyze outputs/token_exports --output runs/before
    """
    from fp16_patch.mismatch.report import offline
    from fp16_patch.mismatch.report.dump_lines import DumpError
    from fp16_patch.mismatch.report.labels import labelled

    require_for_page(html, tokenizer)
    paths = labelled(files)
    folders = {} if output is None else _folders(output, [*paths])
    try:
        for folder in folders.values():
            check_folder(folder, ctx.fail)
            offline.require_no_record(folder)
        records = {label: offline.analyze(path, sampler_key, learner_key) for label, path in paths.items()}
        for label, folder in folders.items():
            with writing(folder):
                offline.write_record(records[label], folder)
    except (DumpError, FileNotFoundError, FileExistsError) as problem:
        raise Failure(problem) from problem
    if as_json:
        print_text(json.dumps({label: offline.figures(record) for label, record in records.items()}, indent=1))
    show(records, html, tokenizer, quiet=as_json)


def _folders(output: Path, labels: Sequence[str]) -> dict[str, Path]:
    """Return where each file's record goes: of several, into a folder of its own."""
    if len(labels) == 1:
        return {labels[0]: output}
    return {label: output / label.strip("/").replace("/", "_") for label in labels}
