"""What the processes of a run import besides the frameworks, vLLM and Ray, which read the plan or their environment."""

# ruff: noqa: F401

from __future__ import annotations

import accelerate
import aiohttp
import compressed_tensors
import datasets
import fastapi
import google.protobuf
import hydra
import jinja2
import jsonschema
import mistral_common.protocol.instruct.request
import mistral_common.tokens.tokenizers.mistral
import networkx
import omegaconf
import openai.types
import openai.types.chat
import openai.types.responses
import opentelemetry.sdk.trace
import pandas
import PIL.Image
import pyarrow
import pydantic
import starlette
import sympy
import tensordict
import torch
import torch._dynamo
import torch._inductor.lowering
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
import torchdata.stateful_dataloader
import transformers
import transformers.models.qwen2.modeling_qwen2
import uvicorn
import xgrammar
import zmq
from transformers.models.auto import modeling_auto

# verl looks at every one of them to find the class of a model.
list(modeling_auto.AutoModelForImageTextToText._model_mapping.keys())
