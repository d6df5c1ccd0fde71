"""What a Hugging Face model folder says of its dtype, and what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def folder_facts(folder: Path) -> dict[str, Any]:
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    held = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            held |= {str(tensors.get_tensor(name).dtype).removeprefix("torch.") for name in tensors.keys()}  # noqa: SIM118
    return {"label": config.get("dtype", config.get("torch_dtype")), "held": sorted(held)}
