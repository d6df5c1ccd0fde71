"""SGLang's own offline engine: what its scheduler attests, and its log-probs; leaves one JSON of them.

Started by `test_engine.py`, as a server is in verl: it expects its scheduler to attest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import sglang
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import fp16_patch
from fp16_patch.runtime import propagation
from fp16_patch.runtime.activation import ledger
from fp16_patch.runtime.preflight import collect_attestations
from fp16_patch.sglang import SCHEDULER
from integration.cpu.launch import SGLANG_ARGUMENTS
from tests.sglang.samplings import PROMPT, SAMPLINGS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--wire", help="the dtype in which weights are sent once more, by torch's name")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.write_text(json.dumps(facts(arguments)), encoding="utf-8")


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is attested before anything is sampled, after, and after a sync; and the log-probs of what was sampled."""
    fp16_patch.activate()
    ledger().kind = "sglang_server"
    propagation.expect_children({SCHEDULER: 1})
    engine = sglang.Engine(
        model_path=arguments.model,
        dtype=arguments.dtype,
        skip_tokenizer_init=True,
        log_level="error",
        **SGLANG_ARGUMENTS,
    )
    found: dict[str, Any] = {"held": collect_attestations(None)}
    found["sampled"] = {name: sampled(engine, sampling) for name, sampling in SAMPLINGS.items()}
    found["computed"] = collect_attestations(None)
    if arguments.wire:
        engine.update_weights_from_tensor(weights(arguments.model, getattr(torch, arguments.wire)))
        found["synced"] = collect_attestations(None)
    engine.shutdown()
    return found


def sampled(engine: Any, sampling: dict[str, Any]) -> dict[str, list[float]]:
    """Sample, and return the tokens with the log-probs that the sampler gives them."""
    answer = engine.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 8, "ignore_eos": True, **sampling}, return_logprob=True
    )
    rows = answer["meta_info"]["output_token_logprobs"]
    return {"tokens": [row[1] for row in rows], "log_probs": [row[0] for row in rows]}


def weights(model: str, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """The model's own, as a learner would send them."""
    from transformers import AutoModelForCausalLM

    learner = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [(name, weight.detach().to(dtype)) for name, weight in learner.state_dict().items()]


# SGLang spawns its processes, and they import this file.
if __name__ == "__main__":
    main()
