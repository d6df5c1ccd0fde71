"""What verl's own attention of vision models casts FP32 queries to."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from fp16_patch.patching.declarations import Status
from tests.installed_release import verdict_on

pytestmark = pytest.mark.verl
torch = pytest.importorskip("torch")
pytest.importorskip("verl")


@pytest.mark.parametrize(("mode", "dtype"), [("observe", "bfloat16"), ("fp16", "float16")])
@pytest.mark.parametrize(("patch", "module"), [("qwen2-vl-attention", "qwen2_vl"), ("glm4v-attention", "glm4v")])
def test_fp32_queries_become_the_plans_dtype(
    activated: Any, monkeypatch: pytest.MonkeyPatch, patch: str, module: str, mode: str, dtype: str
) -> None:
    if verdict_on(patch).status is Status.EXEMPT:
        pytest.skip("this release casts none")
    activated(mode=mode)
    attention = import_module(f"verl.models.transformers.{module}")
    seen = []

    class Stop(Exception):
        pass

    def check(query: Any, key: Any, value: Any, target_dtype: Any) -> Any:
        seen.append(target_dtype)
        raise Stop

    for name in ("_flash_supports_window_size", "_flash_supports_deterministic"):
        monkeypatch.setattr(attention, name, False, raising=False)  # set where flash-attn is installed
    monkeypatch.setattr(attention, "fa_peft_integration_check", check, raising=False)
    states = torch.zeros(1, 2, 1, 2)
    with pytest.raises(Stop):
        attention._custom_flash_attention_forward(states, states, states, None, 2)
    assert seen == [getattr(torch, dtype)]
