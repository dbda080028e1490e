"""Half precision in, half precision out, float32 (or float64) in between.

float16 ends at 65504, well within reach of a sum of products: what lies beyond it is saturated, in
results and in gradients, so that no infinity enters a network.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def accum_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where ``x`` is."""
    return torch.promote_types(x.dtype, torch.float32)


def upcast(x: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Cast to ``dtype``, by default `accum_dtype`; the gradient that comes back is saturated."""
    wide = accum_dtype(x) if dtype is None else dtype
    if not torch.jit.is_scripting():
        if x.dtype == torch.float16 and wide != torch.float16 and x.requires_grad:
            return _Upcast.apply(x, wide)
    return x.to(wide)


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to ``dtype``, saturating where that is float16."""
    if dtype == torch.float16:
        x = x.clamp(-65504.0, 65504.0)  # its largest number
    return x.to(dtype)


def upcast_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product in float32 or float64, whatever autocast says."""
    x, y = upcast(x), upcast(y)
    if not torch.jit.is_scripting():
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return torch.matmul(x, y)
    return torch.matmul(x, y)


class _Upcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return saturating_cast(grad, ctx.dtype), None
