"""What a plan has to know of an engine that samples: vLLM's folder makes one, SGLang's one, a third its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fp16_patch.plan.errors import Conflict
from fp16_patch.plan.plan import Plan
from fp16_patch.samplers.interface import Interface


class Sampler(ABC):
    """One engine that frameworks sample with.

    Attributes:
        name: as frameworks' configurations spell it.
        interface: what is used of its package.
        plugins: the variable that lists the plugins its processes may load.
        renormalizes: whether its log-probs, under top-p or top-k, are those of what is left of the vocabulary. The
            learner's never are.
        log_prob_setting: the setting that makes its log-probs those that it samples by, temperature included, and the
            value that does; None where they always are.
    """

    name: ClassVar[str]
    interface: ClassVar[Interface]
    plugins: ClassVar[str]
    renormalizes: ClassVar[bool]
    log_prob_setting: ClassVar[tuple[str, str] | None]

    @abstractmethod
    def argument_conflicts(self, key: str, arguments: Mapping[str, Any], plan: Plan) -> Iterator[Conflict]:
        """Yield what spoils the plan of the arguments that a run passes to the engine past the framework's own.

        Args:
            key: the setting that holds them.
        """

    @abstractmethod
    def environment_conflicts(self, plan: Plan) -> Iterator[Conflict]:
        """Yield what this process's environment asks of the engine that spoils the plan."""

    @abstractmethod
    def model_conflicts(self, key: str, model: object, plan: Plan) -> Iterator[Conflict]:
        """Yield why the engine does not serve a model under the plan, as far as its stored configuration tells.

        Args:
            key: the setting that names it.
            model: a folder, or a name on Hugging Face's hub; what is not on this machine is not judged.
        """
