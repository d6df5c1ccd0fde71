"""Which accelerators are here, as NVIDIA's tool says it, and where it cannot, torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fp16_patch.doctor import devices

CPU = [{"name": "CPU", "fp16": True, "facts": "no accelerator: FP16 is correct here, and slow"}]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a tool that says so much, and ends so, first on the path; without one, none is there."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_DEVICE_FILES", ())

    def says(answer: str, exit_code: int = 0) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nprintf '{answer}'\nexit {exit_code}\n")
        tool.chmod(0o755)

    return says


def test_each_gpu_is_named_with_its_fp16_units_and_torch_stays_out(
    nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi("NVIDIA H200, 9.0\\nTesla P100, 16GB, 6.0\\n")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert devices.devices() == [
        {"name": "NVIDIA H200", "fp16": True, "facts": "compute capability 9.0"},
        {"name": "Tesla P100, 16GB", "fp16": False, "facts": "compute capability 6.0"},
    ]


def test_without_a_device_it_is_the_cpu(nvidia_smi: Any) -> None:
    assert devices.devices() == CPU
    nvidia_smi("")
    assert devices.devices() == CPU


@pytest.mark.parametrize(("answer", "exit_code"), [("No devices were found", 0), ("GPU, [N/A]", 0), ("", 6)])
def test_what_the_tool_cannot_say_torch_is_asked(
    nvidia_smi: Any, answer: str, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    nvidia_smi(answer, exit_code)
    monkeypatch.setattr(devices, "_DEVICE_FILES", ("/",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "MI300")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    assert devices.devices() == [{"name": "MI300", "fp16": True, "facts": "compute capability 9.4"}]


def test_a_part_of_the_gpus_is_asked_of_torch(nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("NVIDIA H200, 9.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.devices() == CPU
