"""`fp16-patch probe`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from fp16_patch.cli.options import FormerlyOption, InputPath, OutputFile, print_text, several_modes, writing

_UNPROBED = 2


@click.command("probe")
@click.argument("model", type=InputPath())
@click.option(
    "--prompts",
    metavar="FILE",
    type=InputPath(),
    help="Lines of text, JSON lines or parquet, as your data set has them [default: 16 of ours].",
)
@click.option("--count", default=32, show_default=True, help="Responses in each of the sampler's dtypes.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Tokens of a response.")
@click.option("--temperature", default=1.0, show_default=True, help="Sampling temperature of your run.")
@click.option(
    "--sampler",
    type=click.Choice(["auto", "vllm", "hf"]),
    default="auto",
    show_default=True,
    help="What samples; auto: vLLM where it is installed, else the model's own decoding.",
)
@click.option(
    "--mode",
    "dtypes",
    cls=FormerlyOption,
    formerly=["--dtypes"],
    callback=several_modes,
    metavar="MODE,...",
    default="fp32,fp16,bf16",
    show_default=True,
    help="Dtypes of sampler and learner to set against each other: fp32, fp16, bf16.",
)
@click.option("--device", help="Device of the learner [default: cuda where there is one, else cpu].")
@click.option("--seed", default=0, show_default=True, help="Seed of sampling and of the intervals.")
@click.option("--json", "json_path", type=OutputFile(allow_dash=True), help="Write the result here, or - to print it.")
@click.option("--html", type=OutputFile(), help="Write a self-contained page with plots here.")
def command(json_path: Path | None, html: Path | None, device: str | None, **settings: Any) -> None:
    """Measure a model's mismatch and FP16 range before a run.

    Says how large the mismatch of MODEL is, whether it bears FP16's range, and which loss scale to start with. MODEL is
    the directory of a causal language model. Responses are sampled once in each dtype and scored in each; activations
    and gradients are looked at in FP32, module by module.

    A run takes the result by FP16_PATCH_PROBE=probe.json: its starting scale, and a refusal of what was judged unsafe.
    Exit code 0: fp16, 1: bf16, or fp16 only with modules in fp32, 2: it could not be probed.

    \b
    Examples:
      fp16-patch probe models/Qwen2.5-0.5B --json probe.json --html probe.html
      fp16-patch probe models/my_model --prompts data/train.parquet --count 64
    """
    from fp16_patch.untrusted.console import TextConsole

    console = TextConsole(stderr=json_path == Path("-"), piped_width=120)
    from fp16_patch.probe.request import ProbeRequest

    if device is not None:
        settings["device"] = device
    request = ProbeRequest(**settings)
    from fp16_patch.probe.examining import examine
    from fp16_patch.probe.progress import on_terminal
    from fp16_patch.probe.terminal import print_result

    if html is not None:
        from fp16_patch.mismatch.report.rendering import require_report_extra
        from fp16_patch.probe.page import write_page

        require_report_extra()
    with on_terminal(console) as phases:
        result = examine(request, phases)
    print_result(result, console)
    if json_path == Path("-"):
        print_text(json.dumps(result.as_dict(), indent=1))
    elif json_path is not None:
        with writing(json_path, _UNPROBED):
            result.write(json_path)
    if html is not None:
        with writing(html, _UNPROBED):
            write_page(result, html)
    sys.exit(0 if result.recommendation.precision == "fp16" else 1)
