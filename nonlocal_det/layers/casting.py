"""Casts around computations in float32 (or float64) whose inputs and outputs are half precision.

A sum of products easily exceeds the range of float16: results and gradients are clamped to +-65504,
so that no infinity enters a network.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024  # terms per partial sum


def accum_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums over ``x`` accumulate in: float32, or float64 if ``x`` has it."""
    return torch.promote_types(x.dtype, torch.float32)


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


def upcast_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product in float32 or float64, even under autocast.

    Sums of more than `BLOCK` terms, forward and backward, are accumulated in blocks of that many:
    added one by one, as some CPUs' kernels do, rounding errors would grow with the number of
    positions. While tracing, compiling or scripting, the kernel decides.
    """
    x, y = upcast(x), upcast(y)
    if not torch.jit.is_scripting():
        if not is_tracing_or_compiling() and max(x.shape[-1], x.shape[-2], y.shape[-1]) > BLOCK:
            return _BlockedMatmul.apply(x, y)
        return _matmul_outside_autocast(x, y)
    return torch.matmul(x, y)


def _matmul_outside_autocast(x: Tensor, y: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return torch.matmul(x, y)
    return torch.matmul(x, y)


def _blocked_matmul(x: Tensor, y: Tensor) -> Tensor:
    """(B, N, K) times (B, K, M): (B, N, M)."""
    block = max(BLOCK, 4 * x.shape[1], 4 * y.shape[2])  # adding blocks is little beside the rest
    whole = x.shape[2] // block * block
    rest = _matmul_outside_autocast(x[..., whole:], y[:, whole:])
    if whole == 0:
        return rest
    # The samples one by one: a view of the blocks of all would be a copy.
    sums = [
        _matmul_outside_autocast(
            a[:, :whole].unflatten(1, (-1, block)).transpose(0, 1),
            b[:whole].unflatten(0, (-1, block)),
        ).sum(dim=0)
        for a, b in zip(x, y)
    ]
    return rest + torch.stack(sums)


class _BlockedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return _blocked_matmul(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        x, y = ctx.saved_tensors
        d_x = _blocked_matmul(grad, y.mT) if ctx.needs_input_grad[0] else None
        d_y = _blocked_matmul(x.mT, grad) if ctx.needs_input_grad[1] else None
        return d_x, d_y


def is_tracing_or_compiling() -> bool:
    """Whether operators are being captured by a tracer or compiler, for other sizes too."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.jit.is_tracing() or torch.compiler.is_compiling()


class _Upcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return saturating_cast(grad, ctx.dtype), None
