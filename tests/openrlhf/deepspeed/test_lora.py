"""What a LoRA policy sends to the sampler: the base model's names, each weight merged once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.openrlhf
pytest.importorskip("openrlhf")


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    """A float16 policy with adapters that are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.half()


def test_names_are_the_base_models_and_weights_are_merged_and_rounded_once(policy: Any, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from fp16_patch.openrlhf.deepspeed.lora import merged_parameters

    sent = {name: parameter.data for name, parameter in merged_parameters(policy)}
    untouched = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16)
    assert sent.keys() == dict(untouched.named_parameters()).keys()
    assert {weight.dtype for weight in sent.values()} == {torch.float16}
    merged = policy.float().merge_and_unload()
    for name, weight in merged.named_parameters():
        assert torch.equal(sent[name], weight.half()), name
    changed = [name for name, weight in untouched.named_parameters() if not torch.equal(weight, sent[name])]
    assert len(changed) == 4 * 7  # four blocks of seven linear layers


def test_the_policy_is_as_it_was_after_the_sync(policy: Any) -> None:
    from fp16_patch.openrlhf.deepspeed.lora import broadcast_to_vllm

    before = [name for name, _ in policy.named_parameters()]
    trainer = SimpleNamespace(actor=SimpleNamespace(model=SimpleNamespace(module=policy)))
    sent = broadcast_to_vllm(lambda: [name for name, _ in policy.named_parameters()], trainer, (), {})
    assert not any("lora" in name or "base" in name for name in sent)
    assert [name for name, _ in policy.named_parameters()] == before
