"""TransformerEngine's FusedAdam in plain torch, as far as Megatron's distributed optimizer calls it.

verl trains FP16 by it: `use_precision_aware_optimizer` leaves FP32 masters and moments to this optimizer.
"""

import sys
from types import ModuleType
from typing import Any

import torch
import wrapt
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """AdamW. State has the dtypes it is told; arithmetic is in FP32."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "bias_correction": bias_correction})
        self.adam_w_mode, self.master_weights, self.use_decoupled_grad = adam_w_mode, master_weights, use_decoupled_grad
        self.dtypes = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }

    def initialize_state(self, parameter: Tensor, *_: Any) -> None:
        state = self.state[parameter]
        for name in _MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=self.dtypes[name])
        if self.master_weights:
            state["master_param"] = parameter.detach().clone().to(self.dtypes["master_param"])

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        return self.state[parameter][name].float()

    def set_scaled_state(self, parameter: Tensor, name: str, value: Tensor) -> None:
        assert value.dtype == torch.float32  # TransformerEngine's asserts it, too
        self.state[parameter][name] = value.detach().to(self.dtypes[name]).clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                gradient = getattr(parameter, "decoupled_grad", None) if self.use_decoupled_grad else parameter.grad
                if gradient is not None:
                    self._update(parameter, gradient.float(), group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.initialize_state(parameter)
        state = self.state[parameter]
        (first, second), step = group["betas"], group["step"]
        master = state["master_param"] if self.master_weights else parameter
        master.mul_(1 - group["lr"] * group["weight_decay"])
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        spread = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
        master.addcdiv_(state["exp_avg"] / (1 - first**step), spread, value=-group["lr"])
        if self.master_weights:
            parameter.copy_(master)


def install() -> None:
    wrapt.register_post_import_hook(build_by_it, "megatron.core.optimizer")


def build_by_it(optimizers: ModuleType) -> None:
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    optimizers.Adam = distrib_optimizer.Adam = FusedAdam
    optimizers.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = False, True
    optimizers.is_te_min_version = optimizer_config.is_te_min_version = lambda *_args, **_kwargs: True
    wrapt.wrap_function_wrapper(optimizer_config, "OptimizerConfig.__post_init__", finding_it)


def finding_it(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    """The configuration imports the optimizer to see whether it is there; nothing else may find TransformerEngine."""
    names = (f"transformer_engine{rest}" for rest in ("", ".pytorch", ".pytorch.optimizers"))
    package, pytorch, made = map(ModuleType, names)
    package.__path__ = pytorch.__path__ = []
    made.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    stand_ins = {each.__name__: each for each in (package, pytorch, made)}
    sys.modules.update(stand_ins)
    try:
        return wrapped(*args, **kwargs)
    finally:
        for name in stand_ins:
            del sys.modules[name]
