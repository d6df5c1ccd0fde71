"""What OpenRLHF's learner imports besides OpenRLHF itself."""

# ruff: noqa: F401

from __future__ import annotations

import datasets
import deepspeed
import deepspeed.runtime.engine
import peft
import ray
import torch
import torch._dynamo
import torch.utils.cpp_extension
import transformers
import transformers.models.qwen2.modeling_qwen2
