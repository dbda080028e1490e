"""Matrix products in float32 or float64, whose rounding does not grow with the number of terms.

Some CPUs' kernels add the terms of a sum one by one: over the positions of a feature map, their
rounding errors add up. Here long sums are accumulated in blocks, forward and backward (Higham,
"Accuracy and Stability of Numerical Algorithms", section 4.2).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from .capture import is_tracing_or_compiling
from .casting import is_autocast, upcast

BLOCK = 1024  # terms per partial sum


def upcast_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product (B, N, M) of x (B, N, K) and y (B, K, M), even under autocast.

    Sums of more than `BLOCK` terms are accumulated in blocks of at least that many. While tracing,
    compiling or scripting, the kernel decides.
    """
    x, y = upcast(x), upcast(y)
    if not torch.jit.is_scripting():
        if not is_tracing_or_compiling() and max(x.shape[-1], x.shape[-2], y.shape[-1]) > BLOCK:
            return _BlockedMatmul.apply(x, y)
        return _matmul_outside_autocast(x, y)
    return torch.matmul(x, y)


def _matmul_outside_autocast(x: Tensor, y: Tensor) -> Tensor:
    if is_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return torch.matmul(x, y)
    return torch.matmul(x, y)


def _blocked_matmul(x: Tensor, y: Tensor) -> Tensor:
    block = max(BLOCK, 4 * x.shape[1], 4 * y.shape[2])  # adding blocks costs little beside them
    whole = x.shape[2] // block * block
    rest = _matmul_outside_autocast(x[..., whole:], y[:, whole:])
    if whole == 0:
        return rest
    # Sample by sample: a view of the blocks of all samples would be a copy.
    sums = [
        _matmul_outside_autocast(
            a[:, :whole].unflatten(1, (-1, block)).transpose(0, 1),
            b[:whole].unflatten(0, (-1, block)),
        ).sum(dim=0)
        for a, b in zip(x, y)
    ]
    return rest + torch.stack(sums)


class _BlockedMatmul(torch.autograd.Function):
    """`_blocked_matmul` whose gradients, sums over other dimensions, are blocked too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return _blocked_matmul(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        x, y = ctx.saved_tensors
        d_x = _blocked_matmul(grad, y.mT) if ctx.needs_input_grad[0] else None
        d_y = _blocked_matmul(x.mT, grad) if ctx.needs_input_grad[1] else None
        return d_x, d_y
