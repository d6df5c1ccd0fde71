"""`fp16-patch`: doctor, run, probe, report, analyze, watch, matrix, diff, demo."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from fp16_patch import __version__
from fp16_patch.plan.errors import Fp16PatchError
from fp16_patch.plan.plan import MODE_ENV, Plan

_MODE_OF_DTYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fp16-patch")
def main() -> None:
    """One FP16 dtype for sampler and learner, proved in every process and measured."""


@main.command(context_settings=_PASS_THROUGH)
@click.option("--json", "as_json", is_flag=True, help="Print the whole examination as JSON.")
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    help="A source tree, of a fork for example: say which patches hold for it, and nothing of this machine.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def doctor(as_json: bool, source: Path | None, command: tuple[str, ...]) -> None:
    """Say whether this machine, and a command line, are fit for FP16. Exit code 0: fit, 1: not.

    \b
    Examples:
      fp16-patch doctor
      fp16-patch doctor -- python -m verl.trainer.main_ppo actor_rollout_ref.actor.strategy=fsdp2
      fp16-patch doctor --source ../our_verl
    """
    from fp16_patch.doctor import examine

    if source is not None:
        _examine_source(source)
    examination = examine(_plan("fp16"), command)
    if as_json:
        click.echo(json.dumps(examination.as_dict(), indent=1))
    else:
        _print_examination(examination)
    sys.exit(0 if examination.fit else 1)


@main.command(context_settings=_PASS_THROUGH)
@click.option("--mode", default=None, help="fp16 (default), bf16, fp32 or observe.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(mode: str | None, command: tuple[str, ...]) -> None:
    """Run a training command under the plan, in every process it starts.

    \b
    Examples:
      fp16-patch run -- python -m verl.trainer.main_ppo <your usual arguments>
      fp16-patch run -- python -m openrlhf.cli.train_ppo_ray <your usual arguments>
      fp16-patch run --mode observe -- python -m verl.trainer.main_ppo <your usual arguments>
    """
    from fp16_patch.runtime import propagation

    plan = _plan("fp16", mode)
    if shutil.which(command[0]) is None:
        raise click.ClickException(f"{command[0]}: no such program. Fix: put the training command behind `--`")
    if Path(command[0]).name == "ray":
        order = "ray job submit … -- fp16-patch run -- python …"
        raise click.ClickException(f"the plan would stay with the submitting client; turn it round: {order}")
    propagation.carry(plan)
    if plan.active:
        # Unlike a plugin, a module listed here fails loudly when it cannot be imported.
        _append("VERL_USE_EXTERNAL_MODULES", "fp16_patch.autoload")
        _put_first("PYTHONPATH", str(Path(__file__).parent / "runtime" / "startup"))
    os.execvp(command[0], list(command))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Lines of text, JSON lines or parquet, as your data set has them [default: 16 of ours].",
)
@click.option("--count", default=32, show_default=True, help="Responses, in each of the sampler's dtypes.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Tokens of a response.")
@click.option("--temperature", default=1.0, show_default=True, help="As your run samples.")
@click.option(
    "--sampler",
    type=click.Choice(["auto", "vllm", "hf"]),
    default="auto",
    show_default=True,
    help="What samples; auto: vLLM where it is installed, else the model's own decoding.",
)
@click.option("--dtypes", default="fp32,fp16,bf16", show_default=True, help="Of sampler and learner.")
@click.option("--device", help="Of the learner [default: cuda where there is one, else cpu].")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result here; - for the terminal.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained page with plots here.")
def probe(json_path: Path | None, html: Path | None, dtypes: str, device: str | None, **settings: Any) -> None:
    """Say how large MODEL's mismatch is, whether it bears FP16's range, and which loss scale to start with.

    MODEL is the directory of a causal language model. Responses are sampled once in each dtype and scored in each;
    activations and gradients are looked at in FP32, module by module. A run takes the result by
    FP16_PATCH_PROBE=probe.json: its starting scale, and a refusal of what was judged unsafe. Exit code 0: fp16,
    1: bf16, or fp16 only with modules in fp32, 2: it could not be probed.

    \b
    Examples:
      fp16-patch probe models/Qwen2.5-0.5B --json probe.json --html probe.html
      fp16-patch probe models/my_model --prompts data/train.parquet --count 64
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    console = Console(stderr=json_path == Path("-"), width=width)
    try:
        from fp16_patch.mismatch.report.rendering import require_report_extra
        from fp16_patch.probe.examining import ProbeRequest, examine
        from fp16_patch.probe.page import write_page
        from fp16_patch.probe.progress import on_terminal
        from fp16_patch.probe.terminal import print_result

        if html is not None:
            require_report_extra()
        settings["dtypes"] = tuple(name.strip() for name in dtypes.split(",") if name.strip())
        if device is not None:
            settings["device"] = device
        request = ProbeRequest(**settings)
        with on_terminal(console) as phases:
            result = examine(request, phases)
    except ImportError as missing:
        raise click.UsageError(f"probe needs torch and transformers: {missing}") from missing
    except Fp16PatchError as problem:
        raise click.UsageError(str(problem)) from problem
    print_result(result, console)
    if json_path == Path("-"):
        click.echo(json.dumps(result.as_dict(), indent=1))
    elif json_path is not None:
        result.write(json_path)
    if html is not None:
        write_page(result, html)
    sys.exit(0 if result.recommendation.precision == "fp16" else 1)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--html", type=click.Path(path_type=Path), help="Write the page here [default: report.html in the first RUN]."
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Where the tokenizer is that names the worst tokens [default: the plan's model, if it is on this machine].",
)
def report(runs: tuple[Path, ...], html: Path | None, tokenizer: Path | None) -> None:
    """Show what one or more runs measured: a table and a diagnosis here, and a self-contained page with plots.

    RUN is a run's output directory, or the fp16_patch directory in it. Several are set side by side.

    \b
    Examples:
      fp16-patch report checkpoints/my_project/my_run
      fp16-patch report bf16_run fp16_run --html compare.html
    """
    from fp16_patch.mismatch.record.reading import load_run
    from fp16_patch.mismatch.report.labels import labelled

    _require_for_page(html, tokenizer)
    try:
        records = {label: load_run(path) for label, path in labelled(runs).items()}
    except FileNotFoundError as missing:
        raise click.ClickException(str(missing)) from missing
    _show(records, html or runs[0] / "report.html", tokenizer)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained page with plots here.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON instead of the table.")
@click.option("--sampler-key", help="The name of the sampler's log-probs, where it is none of the known ones.")
@click.option("--learner-key", help="The name of the learner's log-probs, likewise.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Where the tokenizer is that names the worst tokens."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write a run record here, for `report`; of several, one a folder."
)
def analyze(
    files: tuple[Path, ...],
    html: Path | None,
    as_json: bool,
    sampler_key: str | None,
    learner_key: str | None,
    tokenizer: Path | None,
    out: Path | None,
) -> None:
    """Compare per-token log-probs that any trainer wrote: JSON lines, one line a sequence.

    \b
    {"step": 0, "sampler_log_probs": [-0.1, …], "learner_log_probs": [-0.2, …], "mask": [1, …], "token_ids": [17, …]}

    step, mask and token_ids may be left out; null and NaN are non-finite. The names of verl, OpenRLHF, slime, TRL,
    NeMo-RL and prime-rl are known as well. FILE may be a .jsonl, a .jsonl.gz, or a directory of them. Several are set
    side by side.

    \b
    Examples:
      fp16-patch analyze log_probs.jsonl
      fp16-patch analyze bf16.jsonl.gz fp16.jsonl.gz --html compare.html
      fp16-patch analyze outputs/token_exports --out runs/before
    """
    from fp16_patch.mismatch.report.dump import DumpError
    from fp16_patch.mismatch.report.labels import labelled
    from fp16_patch.mismatch.report.offline import analyze as analyzed
    from fp16_patch.mismatch.report.offline import figures, write_record

    _require_for_page(html, tokenizer)
    try:
        records = {label: analyzed(path, sampler_key, learner_key) for label, path in labelled(files).items()}
        if out is not None:
            for label, record in records.items():
                write_record(record, out / label.strip("/").replace("/", "_") if len(records) > 1 else out)
    except (DumpError, FileNotFoundError, FileExistsError) as problem:
        raise click.ClickException(str(problem)) from problem
    if as_json:
        click.echo(json.dumps({label: figures(record) for label, record in records.items()}, indent=1))
    _show(records, html, tokenizer, quiet=as_json)


@main.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--address", default="auto", show_default=True, help="The Ray cluster, where no RUN is given.")
@click.option("--every", default=2.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print what there is now and leave.")
def watch(run: Path | None, address: str, every: float, once: bool) -> None:
    """Show what a run measures while it trains, in this terminal; Ctrl-C leaves, the run goes on.

    With RUN, a run's output directory, its record is followed. Without, all runs in the Ray cluster are asked.

    \b
    Examples:
      fp16-patch watch
      fp16-patch watch checkpoints/my_project/my_run
      fp16-patch watch --address 10.0.0.1:6379 --once
    """
    from rich.console import Console

    from fp16_patch.mismatch.report import live
    from fp16_patch.mismatch.report.follow import Cluster, RecordFiles

    try:
        source = RecordFiles(run) if run else Cluster(address)
        live.watch(source.poll, Console(), once, every)
    except (live.SourceLost, FileNotFoundError) as problem:
        raise click.ClickException(str(problem)) from problem


@main.command()
@click.option(
    "--check",
    "checked",
    multiple=True,
    metavar="PACKAGE[==RELEASE]",
    help="Say which patches hold for it; without a release, for the newest.",
)
@click.option("--add", "added", multiple=True, metavar="PACKAGE==RELEASE", help="Declare it for the patches that hold.")
def matrix(checked: tuple[str, ...], added: tuple[str, ...]) -> None:
    """Show which patch was written for which release; check or add a release without installing it.

    A patch holds if the code it changes is, in that release, code it was written for. What --add finds changed is
    shown as a diff, for a person to look at. Exit code 0: each holds or is not needed, 1: not.

    \b
    Examples:
      fp16-patch matrix
      fp16-patch matrix --check verl==0.9.0 --check openrlhf==0.11.1
      fp16-patch matrix --add verl==0.9.2
    """
    from rich.console import Console

    from fp16_patch.patching.declarations import declared_patches
    from fp16_patch.releases import matrix as releases
    from fp16_patch.releases import tables

    # In a file, a table is as wide as it needs to be.
    console, hold = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160), True
    try:
        asked = [releases.Release.parse(text) for text in checked]
        for release, verdicts in zip(asked, releases.check_releases(asked), strict=True):
            tables.print_verdicts(str(release), verdicts, console)
            hold &= releases.covered(verdicts)
        for release in map(releases.Release.parse, added):
            verdicts, diffs = releases.add_release(release)
            tables.print_verdicts(str(release), verdicts, console)
            tables.print_diffs(diffs, console)
            hold &= releases.covered(verdicts)
    except Fp16PatchError as problem:
        raise click.ClickException(str(problem)) from problem
    if not checked and not added:
        tables.print_matrix(declared_patches(), console)
    sys.exit(0 if hold else 1)


@main.command()
@click.option(
    "--source", required=True, type=click.Path(path_type=Path), help="The source tree, which itself is left alone."
)
@click.option(
    "--dtype",
    type=click.Choice(list(_MODE_OF_DTYPE)),
    default="float16",
    show_default=True,
    help="What every role is to compute in.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the diff here [default: standard output].")
def diff(source: Path, dtype: str, output: Path | None) -> None:
    """Write a unified diff that makes a source tree, of a fork for example, compute as it does under the plan.

    It does by edit what the patches do at run time, for a tree that is to run without fp16_patch. Standard error says
    what becomes of each patch, and what is lost: checks, refusals, measurements. Settings are those of the environment
    (FP16_PATCH_INIT_SCALE=1024). Exit code 0: all is known, 1: there is code without an edit, and roles may disagree.

    \b
    Examples:
      fp16-patch diff --source ../our_verl | patch -p1 -d ../our_verl
      fp16-patch diff --source ../our_verl --dtype bfloat16 --output bf16.diff
    """
    from rich.console import Console

    from fp16_patch.releases import tables, tree_diff

    try:
        text, outcomes = tree_diff.diff_of(source, _plan("fp16", _MODE_OF_DTYPE[dtype]))
        if output is None:
            click.echo(text.encode(), nl=False)
        else:
            tree_diff.write(text, output)
    except Fp16PatchError as problem:
        raise click.ClickException(str(problem)) from problem
    tables.print_outcomes(str(source), outcomes, Console(stderr=True))
    sys.exit(0 if tree_diff.complete(outcomes) else 1)


@main.command()
def demo() -> None:
    """Train a tiny model with real verl on this machine's CPU in three precisions and compare (needs a checkout)."""
    makefile = Path(__file__).parents[1] / "Makefile"
    if not makefile.is_file():
        raise click.ClickException(
            "the demo is in the source checkout, not in the installed package: clone it, `make demo`"
        )
    os.execvp("make", ["make", "-C", str(makefile.parent), "demo"])


def _show(records: Any, html: Path | None, tokenizer: Path | None, quiet: bool = False) -> None:
    from rich.console import Console

    from fp16_patch.mismatch.report.comparison import print_comparison, print_diagnosis
    from fp16_patch.mismatch.report.page import write_html
    from fp16_patch.mismatch.report.rendering import ReportExtraMissing

    if not quiet:
        console = Console()
        print_comparison(records, console)
        print_diagnosis(records, console)
    if html:
        try:
            write_html(records, html, "Sampler against learner", tokenizer)
            click.echo(f"page: {html}", err=quiet)
        except ReportExtraMissing as missing:
            click.echo(f"no page was written: {missing}", err=True)


def _require_for_page(html: Path | None, tokenizer: Path | None) -> None:
    """End the command, before any work, where what was asked for the page cannot be had."""
    from fp16_patch.mismatch.report.decoding import tokenizer_of
    from fp16_patch.mismatch.report.rendering import require_report_extra

    try:
        if html is not None:
            require_report_extra()
        if tokenizer is not None:
            tokenizer_of(tokenizer)
    except Fp16PatchError as problem:
        raise click.ClickException(str(problem)) from problem


def _plan(default_mode: str, mode: str | None = None) -> Plan:
    given = {} if mode is None else {MODE_ENV: mode}
    try:
        plan = Plan.from_environment({**os.environ, **given}, default_mode=default_mode)
        # A plan that was carried here does not look at the variable.
        return Plan.from_settings({} if mode is None else {"mode": mode}, "--", base=plan)
    except Fp16PatchError as problem:
        raise click.ClickException(str(problem)) from problem


def _put_first(variable: str, path: str) -> None:
    others = [other for other in os.environ.get(variable, "").split(os.pathsep) if other and other != path]
    os.environ[variable] = os.pathsep.join([path, *others])


def _append(variable: str, module: str) -> None:
    listed = [name for name in os.environ.get(variable, "").split(",") if name]
    os.environ[variable] = ",".join(dict.fromkeys([*listed, module]))


def _examine_source(path: Path) -> None:
    from rich.console import Console

    from fp16_patch.releases import matrix as releases
    from fp16_patch.releases import tables

    try:
        verdicts = releases.check_tree(path)
    except Fp16PatchError as problem:
        raise click.ClickException(str(problem)) from problem
    tables.print_verdicts(str(path), verdicts, Console())
    sys.exit(0 if releases.covered(verdicts) else 1)


def _print_examination(examination: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    for problem in examination.problems:
        console.print(f"[bold red]not fit[/]: {problem}", highlight=False)
    if examination.fit:
        console.print("[bold green]fit[/]", highlight=False)
    found = ", ".join(f"{name} {release}" for name, release in examination.versions.items() if release)
    console.print(f"installed: {found}", highlight=False)
    for device in examination.hardware:
        console.print(f"device: {device['name']} ({device['facts']})", highlight=False)
    applying = sum("applies to" in verdict for verdict in examination.patches.values())
    console.print(f"patches: {applying} of {len(examination.patches)} apply", highlight=False)
    for verdict in examination.patches.values():
        if "applies to" not in verdict:
            console.print(f"  {verdict}", highlight=False)
    if examination.roles:
        table = Table("role", "computes in", "without fp16_patch")
        for role, dtype in examination.roles.items():
            table.add_row(role, dtype, examination.stock_roles[role])
        console.print(table)
    for line in examination.overridden:
        console.print(f"overrides {line}", highlight=False)


if __name__ == "__main__":
    main()
