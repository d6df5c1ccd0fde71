"""What verl's learner imports besides verl itself, which reads the plan."""

# ruff: noqa: F401

from __future__ import annotations

import datasets
import fastapi
import hydra
import networkx
import omegaconf
import peft
import ray
import ray.util.state
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
from transformers.models.auto import modeling_auto

# verl looks at every one of them to find the class of a model.
list(modeling_auto.AutoModelForImageTextToText._model_mapping.keys())
