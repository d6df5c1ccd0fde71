"""A model's folder that brings code of its own, which says when it is run."""

from __future__ import annotations

import json
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "foreign.ForeignConfig",
    "AutoModelForCausalLM": "foreign.ForeignModel",
    "AutoTokenizer": ["foreign.ForeignTokenizer", None],
}


def make_foreign_model(folder: Path) -> Path:
    """Write the folder; returns the file that its code makes when somebody runs it."""
    folder.mkdir()
    was_run = folder / "was_run"
    (folder / "foreign.py").write_text(f"import pathlib\npathlib.Path({str(was_run)!r}).touch()\n")
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "foreign", "auto_map": AUTO_MAP}))
    return was_run
