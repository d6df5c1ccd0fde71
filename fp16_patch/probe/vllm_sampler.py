"""vLLM as the sampler, in a process of its own that gives its memory back.

python -m fp16_patch.probe.vllm_sampler request.json answer.json
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp16_patch.plan.dtypes import torch_name
from fp16_patch.plan.errors import Fp16PatchError
from fp16_patch.probe.extremes import Range
from fp16_patch.probe.sampling import Sampling
from fp16_patch.probe.sequences import Sampled
from fp16_patch.probe.watching import Site
from fp16_patch.runtime.gemm_sums import IEEE_ENVIRONMENT

GIB_OF_CACHE_ON_A_CPU = "1"
GPU_SHARE = 0.8
REPORTED_LINES = 6
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception): \S.*")


class SamplerRefused(Fp16PatchError):
    """vLLM does not serve this model in this dtype; its own words."""


def sample(
    model: Path, prompts: Sequence[Sequence[int]], dtype: str, sampling: Sampling, watch: bool
) -> tuple[list[Sampled], dict[Site, Range]]:
    """Sample one response a prompt and, with `watch`, measure the ranges of what vLLM's modules put out.

    Args:
        dtype: `fp32`, `fp16` or `bf16`.

    Raises:
        SamplerRefused: vLLM ended without an answer.
    """
    request = {
        "model": str(model),
        "dtype": torch_name(dtype),
        "prompts": [list(prompt) for prompt in prompts],
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "stop": sorted(sampling.stop),
        "seed": sampling.seed,
        "watch": watch,
    }
    with tempfile.TemporaryDirectory(prefix="fp16_patch_probe_") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", __spec__.name, str(asked), str(answered)]
        process = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if process.returncode or not answered.is_file():
            raise SamplerRefused(_what_it_says(process.stderr or process.stdout))
        answer = json.loads(answered.read_text(encoding="utf-8"))
    pairs = zip(prompts, answer["responses"], answer["log_probs"], strict=True)
    sampled = [Sampled(tuple(prompt), tuple(tokens), tuple(values)) for prompt, tokens, values in pairs]
    return sampled, {Site(*entry["site"]): Range.of_dict(entry["range"]) for entry in answer["ranges"]}


def _environment() -> dict[str, str]:
    """Return the caller's environment without a plan: a probe asks what a model does by itself. FP32 is no TF32."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FP16_PATCH")}
    return {"VLLM_CPU_KVCACHE_SPACE": GIB_OF_CACHE_ON_A_CPU, "VLLM_LOGGING_LEVEL": "ERROR", **kept, **IEEE_ENVIRONMENT}


def _what_it_says(output: str) -> str:
    """Return the first error of vLLM's processes; those after it only say that there was one."""
    errors = _ERROR.findall(output)
    return errors[0] if errors else "\n".join(output.splitlines()[-REPORTED_LINES:]) or "vLLM ended without a message"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load the model, sample and say what came; runs in the process of its own."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, request["prompts"])) + request["max_new_tokens"]
    engine = LLM(
        request["model"],
        dtype=request["dtype"],
        max_model_len=longest + 1,
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=GPU_SHARE,
        logprobs_mode="processed_logprobs",
        seed=request["seed"],
        worker_extension_cls="fp16_patch.probe.vllm_watch.RangeWatchExtension",
    )
    parameters = [
        SamplingParams(
            temperature=request["temperature"],
            top_p=1.0,
            top_k=0,
            max_tokens=request["max_new_tokens"],
            stop_token_ids=request["stop"],
            logprobs=0,
            seed=request["seed"] + number,
            detokenize=False,
        )
        for number in range(len(request["prompts"]))
    ]
    engine.collective_rpc("hold_sums")
    if request["watch"]:
        engine.collective_rpc("start_range_watch")
    asked = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = [output.outputs[0] for output in engine.generate(asked, parameters, use_tqdm=False)]
    ranges = engine.collective_rpc("stop_range_watch")[0] if request["watch"] else []
    return {
        "responses": [list(output.token_ids) for output in outputs],
        "log_probs": [[chosen[token].logprob for token, chosen in _tokens(output)] for output in outputs],
        "ranges": ranges,
    }


def _tokens(output: Any) -> list[tuple[int, Any]]:
    return list(zip(output.token_ids, output.logprobs, strict=True))


def main() -> None:
    asked, answered = map(Path, sys.argv[1:])
    answered.write_text(json.dumps(answer(json.loads(asked.read_text(encoding="utf-8")))), encoding="utf-8")


# vLLM spawns its processes, and they import this file.
if __name__ == "__main__":
    main()
