"""Sums under ReLU weights, as used by the concatenation function, in O(N log N).

    y_i = s * sum_j g_j ReLU(a_i - c_j)

As a function of a_i this is piecewise linear, with a breakpoint at every c_j. With c sorted, its
slope between two breakpoints is a prefix sum of g, and its value at a breakpoint the prefix sum of
slope times gap. All its terms are terms of the dense sum too: nothing cancels that does not cancel
there. (The shorter formula, a_i * sum(g) - sum(c * g), subtracts two large numbers.)

The gradients are of the same kind with a and c exchanged: d_g_j = s * sum_i d_y_i ReLU(a_i - c_j),
and those of a and c are inner products with slopes.

Cost: O((N + M) V) operations after O(M log M + N log M) for the sorting and searching, in memory
of O(N + M) and one block of channels; the dense sum takes 2 N M V operations.

Shape symbols: B batch, V value channels, N query and M key positions.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .transforms import differentiable_gradients, fold_into_batch, split_from_batch

BLOCK = 2**18  # numbers in a block of channels: 1 MB in float32, so that it stays in cache


class Breakpoints(NamedTuple):
    """The sorted keys, and where the queries lie among them.

    Attributes:
        order: Indices that sort the keys by c, ascending, (B, M).
        gap: Distance from the previous key to each sorted key, times s, (B, M). The first has no
            effect.
        last: Rank of the last key below each query, (B, N); 0 if there is none.
        rise: Distance from that key to the query, times s, (B, N); 0 if there is none.
    """

    order: Tensor
    gap: Tensor
    last: Tensor
    rise: Tensor


def find_breakpoints(a: Tensor, c: Tensor, s: Tensor) -> Breakpoints:
    """Sort the keys and find each query's rank among them.

    Args:
        a: Queries, (B, N).
        c: Keys, (B, M), M > 0; an infinite one has no effect.
        s: Factor of the result, (B, 1).
    """
    c, order = torch.sort(c, dim=1, stable=True)
    last = (torch.searchsorted(c, a.contiguous()) - 1).clamp(min=0)
    rise = F.relu(a - c.gather(1, last)) * s
    c = c.masked_fill(torch.isinf(c), 0.0)
    gap = (c - _shift(c)) * s
    return Breakpoints(order, gap, last, rise)


def slopes(g: Tensor, breakpoints: Breakpoints) -> Tensor:
    """Prefix sums of g (B, V, M) in the order of the sorted keys, (B, V, M)."""
    return g.gather(2, breakpoints.order.unsqueeze(1).expand_as(g)).cumsum(dim=2)


def at_queries(sums: Tensor, breakpoints: Breakpoints) -> Tensor:
    """Pick from values at the sorted keys (B, V, M) those at each query's last key, (B, V, N)."""
    return sums.gather(2, breakpoints.last.unsqueeze(1).expand(-1, sums.shape[1], -1))


def evaluate(slope: Tensor, slope_at_queries: Tensor, breakpoints: Breakpoints) -> Tensor:
    """Value at each query's last breakpoint plus the slope after it times the rise, (B, V, N)."""
    values = (_shift(slope) * breakpoints.gap.unsqueeze(1)).cumsum(dim=2)
    return torch.addcmul(
        at_queries(values, breakpoints), slope_at_queries, breakpoints.rise.unsqueeze(1)
    )


def _shift(x: Tensor) -> Tensor:
    """Shift the last dimension by one, with a zero in front."""
    return F.pad(x, (1, 0))[..., :-1]


def hinge_sums(a: Tensor, c: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """Compute s_b * sum_j g_j ReLU(a_i - c_j), (B, V, N), by blocks of channels, differentiably.

    Args:
        a: Queries, (B, N).
        c: Keys, (B, M), M > 0; an infinite one has no effect.
        g: Values, (B, V, M).
        s: Factor of the result, (B, 1); it gets no gradient.
    """
    return _HingeSums.apply(a, c, g, s)


def hinge_sums_composite(a: Tensor, c: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """`hinge_sums` composed of ordinary operators, for scripting, tracing, compiling or export."""
    breakpoints = find_breakpoints(a, c, s)
    slope = slopes(g, breakpoints)
    return evaluate(slope, at_queries(slope, breakpoints), breakpoints)


class _HingeSums(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, c: Tensor, g: Tensor, s: Tensor) -> Tensor:
        breakpoints = find_breakpoints(a, c, s)
        y = g.new_empty(*g.shape[:2], a.shape[1])
        for v in _channel_blocks(y, g):
            slope = slopes(g[:, v], breakpoints)
            y[:, v] = evaluate(slope, at_queries(slope, breakpoints), breakpoints)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Optional[int], ...], *args: Tensor) -> tuple[Tensor, int]:
        y = _HingeSums.apply(*fold_into_batch(info.batch_size, in_dims, args))
        return split_from_batch(info.batch_size, y), 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, c, g, s = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients will be differentiated
            composite = partial(hinge_sums_composite, s=s)
            return (*differentiable_gradients(composite, (a, c, g), grad), None)
        grad = grad.contiguous()
        forth, back = find_breakpoints(a, c, s), find_breakpoints(-c, -a, s)
        d_a, d_c, d_g = torch.zeros_like(a), torch.zeros_like(c), torch.empty_like(g)
        for v in _channel_blocks(grad, g):
            d_a += (at_queries(slopes(g[:, v], forth), forth) * grad[:, v]).sum(dim=1)
            slope = slopes(grad[:, v], back)
            slope_at_keys = at_queries(slope, back)
            d_g[:, v] = evaluate(slope, slope_at_keys, back)
            d_c -= (slope_at_keys * g[:, v]).sum(dim=1)
        # A query that lies above no key, or a key below no query, has slope 0, not the first one.
        return d_a * s * (forth.rise > 0), d_c * s * (back.rise > 0), d_g, None


def _channel_blocks(y: Tensor, g: Tensor) -> list[slice]:
    channels = max(BLOCK // max(y[:, 0].numel(), g[:, 0].numel(), 1), 1)
    return [slice(v, v + channels) for v in range(0, g.shape[1], channels)]
