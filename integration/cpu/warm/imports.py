"""What runs import besides the frameworks, vLLM and Ray: those read the plan, or what each process is started with."""

from __future__ import annotations

import contextlib
import importlib

# Those that take longest; an environment need not have them all.
NAMES = (
    "torch",
    "torch._dynamo",
    "torch._inductor.lowering",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers",
    "transformers.models.qwen2.modeling_qwen2",
    "PIL.Image",
    "accelerate",
    "aiohttp",
    "compressed_tensors",
    "datasets",
    "fastapi",
    "google.protobuf",
    "hydra",
    "jinja2",
    "jsonschema",
    "mistral_common.protocol.instruct.request",
    "mistral_common.tokens.tokenizers.mistral",
    "networkx",
    "omegaconf",
    "openai.types.chat",
    "openai.types.responses",
    "opentelemetry.sdk.trace",
    "pandas",
    "peft",
    "pyarrow",
    "pydantic",
    "starlette",
    "sympy",
    "tensordict",
    "torchdata.stateful_dataloader",
    "uvicorn",
    "xgrammar",
    "zmq",
)

for name in NAMES:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)

# verl looks at every one of them to find the class of a model.
models = importlib.import_module("transformers.models.auto.modeling_auto")
list(models.AutoModelForImageTextToText._model_mapping.keys())
