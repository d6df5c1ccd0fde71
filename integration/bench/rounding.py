"""Matrix products of a pretended precision: FP32 whose operands are first rounded to a few mantissa bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FP32_MANTISSA_BITS = 23
# Overload → which of its arguments are the operands; a bias is not one of them.
PRODUCTS: dict[Any, tuple[int, int]] = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
}


@dataclass(frozen=True)
class Precision:
    """``bits`` stored mantissa bits (BF16 has 7, FP16 10), exponents of FP32, ``phase``: where the grid's points lie.

    An operand x becomes ``R(phase · x) / phase``. Every phase has the same relative spacing and the same exponents, so
    two phases are equally precise; between powers of two they round the same operand to different values.
    """

    bits: int
    phase: float = 1.0

    def rounded(self, operand: Tensor) -> Tensor:
        if self.phase == 1.0:
            return round_mantissa(operand, self.bits)
        return round_mantissa(operand * self.phase, self.bits) / self.phase


class Rounded(TorchDispatchMode):
    """While entered, every matrix product, of a forward or a backward, takes its operands in ``precision``.

    Sums are FP32, as in a tensor core; so is all that is no matrix product. ``None`` leaves everything as it is.
    """

    def __init__(self, precision: Precision | None) -> None:
        super().__init__()
        self.precision = precision

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.precision is not None and func in PRODUCTS:
            args = self._with_rounded_operands(args, *PRODUCTS[func])
        return func(*args, **(kwargs or {}))

    def _with_rounded_operands(self, args: tuple[Any, ...], left: int, right: int) -> tuple[Any, ...]:
        assert self.precision is not None
        # One term, so no sum: RoPE's angles, position · frequency, which frameworks keep in FP32.
        if args[left].shape[-1] == 1:
            return args
        rounded = list(args)
        rounded[left] = self.precision.rounded(args[left])
        rounded[right] = self.precision.rounded(args[right])
        return tuple(rounded)


def round_mantissa(values: Tensor, bits: int) -> Tensor:
    """FP32 ``values`` to the nearest with ``bits`` stored mantissa bits, ties to the even one; NaN stays NaN.

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
