"""What vLLM imports in its server, its engine and its workers."""

# ruff: noqa: F401

from __future__ import annotations

import torch._dynamo
import torch._inductor
import vllm
import vllm.entrypoints.openai.api_server
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker
