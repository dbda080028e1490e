"""Casts around computations in float32 (or float64) whose inputs and outputs are half precision.

A sum of products easily exceeds the range of float16: results and gradients are clamped to +-65504,
so that no infinity enters a network.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor


def accum_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums over ``x`` accumulate in: float32, or float64 if ``x`` has it."""
    return torch.promote_types(x.dtype, torch.float32)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def upcast(x: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Cast to ``dtype``, by default `accum_dtype`; float16 gradients are clamped to +-65504."""
    target = accum_dtype(x) if dtype is None else dtype
    if not torch.jit.is_scripting():
        if x.dtype == torch.float16 and target != torch.float16 and x.requires_grad:
            return _Upcast.apply(x, target)
    return x.to(target)


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to ``dtype``; float16 results are clamped to +-65504."""
    if dtype == torch.float16:
        x = x.clamp(-65504.0, 65504.0)
    return x.to(dtype)


class _Upcast(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return saturating_cast(grad, ctx.dtype), None
