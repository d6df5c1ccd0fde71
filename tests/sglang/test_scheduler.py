"""What is watched in the models that SGLang serves: text, images beside text, and scores of sequences."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.sglang

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed here", allow_module_level=True)

from tests.conftest import sglang_environment

Row = dict[str, list[str]]


@pytest.fixture(scope="module")
def rows(warm_python_for_sglang: Path) -> dict[str, Row]:
    command = [str(warm_python_for_sglang), str(Path(__file__).with_name("heads.py"))]
    result = subprocess.run(command, env=sglang_environment(), text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("model", ["text", "images and text"])
def test_hidden_states_are_seen_wherever_a_model_has_its_head(model: str, rows: dict[str, Row]) -> None:
    # Of the first pass alone.
    assert rows[model]["activation"] == ["bfloat16"]


def test_a_model_that_scores_sequences_has_no_such_head_and_is_served(rows: dict[str, Row]) -> None:
    held = dict.fromkeys(("engine_weight", "module_output"), ["float16"])
    # What convolutions see is in bfloat16 here.
    assert rows["scores"] == {**held, "kv_cache": ["bfloat16", "float16"], "gemm_sum": ["float32"]}
