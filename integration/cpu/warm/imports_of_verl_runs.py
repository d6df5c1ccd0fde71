"""What the processes of a run of verl import besides verl."""

# ruff: noqa: F401

from __future__ import annotations

from integration.cpu.warm import imports_of_verl, imports_of_vllm
