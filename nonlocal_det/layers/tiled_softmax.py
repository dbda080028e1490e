"""Softmax attention in tiles of plain matrix products, for cases that fused kernels do badly.

A running maximum and sum make the softmax exact one tile of keys at a time, so that no more than
a tile of the N x M weights exists; backward recomputes them from each row's log-sum-exp. The
technique: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (arXiv 2112.05682), and
Dao et al., "FlashAttention" (arXiv 2205.14135), algorithms 1 and 4.

Two details differ from these. Keys and values may differ in width, without padding. And weights
below the square root of the smallest normal number are set to zero: at 1e-19 of a row's sum
(float32) they are far below its rounding, but products with denormal numbers are up to 70 times
slower on a CPU, and the weights of an unscaled block, whose logits have a standard deviation of 10
to 40, are full of them.

A tile's product is added as a whole: `baddbmm` may add its terms one by one to what is there, and
over many tiles rounding errors would grow with the number of positions.

Cost: 2 N M (D + V) operations forward, 2 N M (3 D + 2 V) backward; memory of one or two tiles.

Shape symbols: B batch, D inner channels, V value channels, N query and M key positions.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from .dense_weights import softmax_weights
from .matmul import upcast_matmul
from .transforms import differentiable_gradients, fold_into_batch, split_from_batch

TILE = 1024  # queries and keys per tile: 4 MB in float32, about what a core's cache holds


def tiled_softmax_attention(
    theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]
) -> Tensor:
    """Attention output under the softmax over j of theta_i . phi_j.

    Args:
        theta: Queries, (B, D, N).
        phi: Keys, (B, D, M).
        g: Values, (B, V, M), of the same dtype.
        mask: Boolean (B, M), True at valid keys, or None for all.

    Returns:
        Attention output, (B, V, N).
    """
    return _TiledSoftmaxAttention.apply(theta, phi, g, mask)[0]


def _dense_attention(theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]) -> Tensor:
    return upcast_matmul(g, softmax_weights(theta, phi, mask, 1.0).mT)


class _TiledSoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]
    ) -> tuple[Tensor, Tensor]:
        batch, _, queries = theta.shape
        y = g.new_zeros(batch, g.shape[1], queries)
        log_sum = theta.new_empty(batch, queries, 1)
        (buffer,) = _buffers(theta, phi, count=1)
        without_keys = theta.new_zeros(batch, 1, 1) if mask is None else _without_keys(theta, mask)
        for b, n in _blocks(theta, phi):
            sums = y[b, :, n]
            top = torch.full_like(log_sum[b, n], torch.finfo(theta.dtype).min)
            total = torch.zeros_like(top)
            for m in _spans(phi.shape[2], TILE):
                logits = _logits(buffer, theta[b, :, n], phi[b, :, m], mask, b, m)
                higher = torch.maximum(top, logits.amax(dim=2, keepdim=True))
                fade = _exp_(top - higher)
                weights = _exp_(logits.sub_(higher))
                total.mul_(fade).add_(weights.sum(dim=2, keepdim=True))
                sums.mul_(fade.mT).add_(upcast_matmul(g[b, :, m], weights.mT))
                top = higher
            total.add_(without_keys[b])  # otherwise zero only if all logits are -inf: NaN, as dense
            sums.div_(total.mT)
            log_sum[b, n] = top + total.log()
        return y, log_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Optional[int], ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        results = _TiledSoftmaxAttention.apply(*fold_into_batch(info.batch_size, in_dims, args))
        return tuple(split_from_batch(info.batch_size, result) for result in results), (0, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        theta, phi, g, mask, y, log_sum = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients will be differentiated
            dense = partial(_dense_attention, mask=mask)
            return (*differentiable_gradients(dense, (theta, phi, g), grad), None)
        grad = grad.contiguous()
        d_theta, d_phi, d_g = (torch.zeros_like(t) for t in (theta, phi, g))
        buffer, d_buffer = _buffers(theta, phi, count=2)
        shared = (grad * y).sum(dim=1).unsqueeze(2)
        for b, n in _blocks(theta, phi):
            for m in _spans(phi.shape[2], TILE):
                logits = _logits(buffer, theta[b, :, n], phi[b, :, m], mask, b, m)
                weights = _exp_(logits.sub_(log_sum[b, n]))
                d_g[b, :, m].add_(upcast_matmul(grad[b, :, n], weights))
                d_logits = _view(d_buffer, weights.shape)
                torch.bmm(grad[b, :, n].mT, g[b, :, m], out=d_logits)
                d_logits.sub_(shared[b, n]).mul_(weights)
                d_theta[b, :, n].add_(upcast_matmul(phi[b, :, m], d_logits.mT))
                d_phi[b, :, m].add_(upcast_matmul(theta[b, :, n], d_logits))
        return d_theta, d_phi, d_g, None


def _without_keys(theta: Tensor, mask: Tensor) -> Tensor:
    """(B, 1, 1): 1 for a sample without a valid key, else 0."""
    return (~mask.any(dim=1)).to(theta.dtype).view(-1, 1, 1)


def _spans(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def _samples(theta: Tensor, phi: Tensor) -> int:
    """Number of samples that share a tile: one, or more if each has few positions."""
    tile = min(theta.shape[2], TILE) * min(phi.shape[2], TILE)
    return max(min(theta.shape[0], TILE**2 // max(tile, 1)), 1)


def _blocks(theta: Tensor, phi: Tensor) -> itertools.product[tuple[slice, slice]]:
    """Slices of samples and of queries, tile by tile."""
    return itertools.product(
        _spans(theta.shape[0], _samples(theta, phi)), _spans(theta.shape[2], TILE)
    )


def _buffers(theta: Tensor, phi: Tensor, count: int) -> list[Tensor]:
    """Memory for the largest tile, allocated once: allocation costs as much as a pass over it."""
    tile = min(theta.shape[2], TILE) * min(phi.shape[2], TILE)
    return [theta.new_empty(_samples(theta, phi) * tile) for _ in range(count)]


def _view(buffer: Tensor, shape: torch.Size) -> Tensor:
    return buffer[: shape.numel()].view(shape)


def _logits(
    buffer: Tensor, theta: Tensor, phi: Tensor, mask: Optional[Tensor], b: slice, m: slice
) -> Tensor:
    logits = _view(buffer, torch.Size((theta.shape[0], theta.shape[2], phi.shape[2])))
    torch.bmm(theta.mT, phi, out=logits)
    return logits if mask is None else logits.masked_fill_(~mask[b, m].unsqueeze(1), -math.inf)


def _exp_(x: Tensor) -> Tensor:
    """Exponentiate in place; zero below the square root of the smallest normal number."""
    lowest = 0.5 * math.log(torch.finfo(x.dtype).tiny)
    return torch.threshold_(x, lowest, -math.inf).exp_()
