"""Megatron-Bridge, which imports TransformerEngine to know its layers from others, and Triton for Mamba's kernels.

Neither is used here. Both are there for the length of the import, and found by nobody else.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

LOOKS_FOR_TRANSFORMER_ENGINE = (
    "extensions.transformer_engine",
    "extensions.transformer_engine_spec_provider",
    "fp4_utils",
    "fp8_utils",
    "models.T5.t5_spec",
    "models.bert.bert_layer_specs",
    "models.gpt.experimental_attention_variant_module_specs",
    "models.gpt.gpt_layer_specs",
    "models.gpt.heterogeneous.heterogeneous_layer_specs",
    "models.multimodal.llava_model",
    "models.vision.clip_vit_model",
    "optimizer",
    "optimizer.clip_grads",
    "optimizer.cpu_offloading.hybrid_optimizer",
    "optimizer.distrib_optimizer",
    "post_training.modelopt.layers",
    "inference.text_generation_controllers.text_generation_controller",
)
"""Modules of Megatron-Core that decide at their import whether there is a TransformerEngine; they shall find none."""


class _NamedModules(type):
    """Gives a class of any name: no layer is one, and none can be built."""

    def __getattr__(cls, name: str) -> Any:
        return _made(cls, name)


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _made(self, name)


def _made(owner: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    made = _NamedModules(name, (torch.nn.Module,), {})
    setattr(owner, name, made)
    return made


def import_once() -> None:
    """Import Megatron-Bridge, if it is there, where it finds these names."""
    if "megatron.bridge" in sys.modules or importlib.util.find_spec("megatron.bridge") is None:
        return
    for name in LOOKS_FOR_TRANSFORMER_ENGINE:
        importlib.import_module(f"megatron.core.{name}")
    with _named_packages():
        importlib.import_module("megatron.bridge")
    _build_layers_by_the_same_names()


@contextmanager
def _named_packages() -> Iterator[None]:
    engine, pytorch = _Package("transformer_engine"), _Package("transformer_engine.pytorch")
    engine.__path__, engine.pytorch, engine.__version__ = [], pytorch, "2.9.0"
    triton, language = _Package("triton"), _Package("triton.language")
    triton.__path__, triton.language = [], language
    triton.jit = triton.heuristics = triton.autotune = _undecorated
    stand_ins = {each.__name__: each for each in (engine, pytorch, triton, language)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stands for a decorator, with arguments or without."""
    return function if callable(function) else _undecorated


def _build_layers_by_the_same_names() -> None:
    """As TransformerEngine's specification, ours is that of one layer: the block counts the stage's by itself."""
    from megatron.bridge.models import gpt_provider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_block
    from megatron_on_cpu.layer_specs import complete
    from megatron_on_cpu.layers import TENorm

    def layer_spec(config: Any) -> Any:
        spec = gpt_layer_specs.get_gpt_decoder_layer_specs(
            config, use_transformer_engine=False, normalization="RMSNorm"
        )[0]
        complete(spec.submodules, config)
        return spec

    transformer_block.LayerNormImpl = TENorm
    gpt_provider.transformer_engine_layer_spec = gpt_provider.local_layer_spec = layer_spec
