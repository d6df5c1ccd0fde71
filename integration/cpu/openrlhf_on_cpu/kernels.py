"""DeepSpeed's kernels: those that were compiled when the environment was made, without asking the compiler again."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt


def install() -> None:
    wrapt.register_post_import_hook(load_what_is_compiled, "deepspeed.ops.op_builder.builder")


def load_what_is_compiled(builder: ModuleType) -> None:
    wrapt.wrap_function_wrapper(builder, "OpBuilder.jit_load", jit_load)


def jit_load(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every process would have ninja look whether a kernel is up to date, and compile it for each copy of DeepSpeed."""
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"], instance.name)
    library = folder / f"{instance.name}.so"
    # Torch's lock: another process compiles it just now.
    if not library.exists() or (folder / "lock").exists():
        return wrapped(*args, **kwargs)
    spec = spec_from_file_location(instance.name, library)
    assert spec is not None and spec.loader is not None
    kernel = module_from_spec(spec)
    spec.loader.exec_module(kernel)
    instance._loaded_ops[instance.name] = kernel
    return kernel
