"""Multiply matrices in a pretended precision: in FP32, with operands first rounded to a few mantissa bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FP32_MANTISSA_BITS = 23


@dataclass(frozen=True)
class Precision:
    """A precision of `bits` stored mantissa bits (BF16 has 7, FP16 10) and FP32's exponents; `phase` shifts the grid.

    An operand x becomes ``R(phase · x) / phase``. Every phase has the same number of points between x and 2x, so two
    phases are equally precise; unless one is a power of two times the other, they round x to different values.
    """

    bits: int
    phase: float = 1.0

    def rounded(self, values: Tensor) -> Tensor:
        if self.phase == 1.0:
            return round_mantissa(values, self.bits)
        return round_mantissa(values * self.phase, self.bits) / self.phase


def operand(values: Tensor, precision: Precision | None) -> Tensor:
    """Round values as `product` takes them; their gradient passes unchanged. `None` is FP32 as it is."""
    if precision is None:
        return values
    # For a small operand of a sampler, `apply` would cost as much as the rounding.
    return _Operand.apply(values, precision) if torch.is_grad_enabled() else precision.rounded(values)


def product(left: Tensor, right: Tensor, precision: Precision | None) -> Tensor:
    """Compute `left @ right`, summed in FP32; both are operands already, (…, m, k) and (…, k, n).

    The backward's products, ``R(g) rightᵀ`` and ``leftᵀ R(g)``, take their operands in ``precision`` too.
    """
    if precision is None or not torch.is_grad_enabled():
        return left @ right
    return _Product.apply(left, right, precision)


class _Operand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, precision: Precision) -> Tensor:
        return precision.rounded(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, precision: Precision) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.precision = precision
        return left @ right

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        gradient = ctx.precision.rounded(gradient)
        return gradient @ right.mT, left.mT @ gradient, None


def round_mantissa(values: Tensor, bits: int) -> Tensor:
    """Round FP32 values to the nearest with `bits` stored mantissa bits, ties to the even one; NaN stays NaN.

    With ``drop = 23 − bits`` and the pattern read as an integer: add ``2^(drop−1) − 1``, and 1 more where the last bit
    kept is odd, then clear the lowest ``drop`` bits. A carry runs into the exponent, which is the next power of two.
    """
    if values.dtype != torch.float32 or not 0 < bits < FP32_MANTISSA_BITS:
        raise ValueError(f"expected float32 and 1 to {FP32_MANTISSA_BITS - 1} bits, got {values.dtype} and {bits}")
    drop = FP32_MANTISSA_BITS - bits
    pattern = values.contiguous().view(torch.int32)
    odd = (pattern >> drop).bitwise_and_(1)
    nearest = odd.add_(pattern).add_((1 << (drop - 1)) - 1).bitwise_and_(-(1 << drop)).view(torch.float32)
    # A NaN's mantissa could carry over its sign bit, or be cleared to infinity.
    return torch.where(values.isnan(), values, nearest)
