"""vLLM's own offline engine, asked for its workers' records before and after it generates; leaves one JSON of them.

Started by `test_engine.py`, as the process that holds an engine is in verl and OpenRLHF: `FP16_PATCH_KIND=server`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.plugins import load_general_plugins

sys.path.insert(0, str(Path(__file__).parents[2]))
from fp16_patch.runtime import propagation
from fp16_patch.runtime.preflight import collect_attestations
from fp16_patch.vllm.server import record_of_worker


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--executor")
    parser.add_argument("--without-plugins", action="store_true", help="in the processes that vLLM starts")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    load_general_plugins()
    if arguments.without_plugins:
        os.environ["VLLM_PLUGINS"] = ""
    arguments.out.write_text(json.dumps(facts(arguments)), encoding="utf-8")


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the workers attest, and what the process that holds the engine answers for itself and its children."""
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        distributed_executor_backend=arguments.executor,
        enforce_eager=True,
        max_model_len=64,
        worker_extension_cls="tests.vllm.amx.Extension",
    )
    left = collect_attestations(None)
    before = llm.collective_rpc(record_of_worker)
    generated = llm.generate("1+1=", SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    after = llm.collective_rpc(record_of_worker)
    propagation.keep_children(after)
    tokens = len(generated[0].outputs[0].token_ids)
    return {"left": left, "before": before, "after": after, "answered": collect_attestations(None), "tokens": tokens}


# vLLM spawns its processes, and they import this file.
if __name__ == "__main__":
    main()
