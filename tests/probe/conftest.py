"""Tiny models to probe. One thread: they are too small for more, and other processes may be at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from fp16_patch.probe.examining import examine
from fp16_patch.probe.request import ProbeRequest
from fp16_patch.probe.result import ProbeResult
from integration.cpu import tiny_families


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny family's model, or of one that is made unsafe."""
    known: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in known:
            make = tiny_families.write_family if name in tiny_families.FAMILIES else tiny_families.write_unsafe
            known[name] = make(name, tmp_path_factory.mktemp(name))
        return known[name]

    return write


@pytest.fixture(scope="session")
def probed(written: Callable[[str], Path]) -> Callable[..., ProbeResult]:
    """A quick probe of a tiny model: its range alone, unless dtypes are given."""

    def probe(name: str, **settings: object) -> ProbeResult:
        quick = {"sampler": "hf", "dtypes": ("fp32",), "count": 4, "max_new_tokens": 12, "device": "cpu"}
        return examine(ProbeRequest(written(name), **{**quick, **settings}))  # type: ignore[arg-type]

    return probe
