"""OpenRLHF's models and the DeepSpeed engines behind them."""

from __future__ import annotations

from typing import Any


def inner(model: Any) -> Any:
    """Return DeepSpeed's engine, or the bare model before there is one: OpenRLHF wraps a policy's in `Actor`."""
    return model.model if is_actor(model) else model


def is_actor(model: Any) -> bool:
    """Return whether it is OpenRLHF's wrapper of a policy."""
    from openrlhf.models import Actor

    return isinstance(model, Actor)
