"""The pairwise functions f of a non-local operation, and the attention output under them.

    y_i = 1/C(x) * sum_j f(x_i, x_j) g(x_j)

Each has two implementations. ``*_weights`` returns the dense attention weights f / C: the
definition, the reference of the tests, and the source of attention maps.
``*_attention`` returns the attention output y, exactly, without materializing the weights (unless
they are no larger than the values):

| attention output          | operations, forward           | memory beyond input and output |
|---------------------------|-------------------------------|--------------------------------|
| `softmax_attention`       | 2 N M (D + V)                 | 4 MB, or copies of the inputs  |
| `dot_product_attention`   | 2 D V (N + M)                 | D V                            |
| `concatenation_attention` | about 10 V (N + M) and a sort | O(N + M), a block of channels  |

Shape symbols: B batch, D inner channels, V value channels, N query and M key positions.
Channels come before positions, as convolutions leave them. Any of B, N and M may be zero.

A key mask is a boolean (B, M), True at valid keys. Masked keys neither contribute nor count; a
query without any valid key gets y = 0, and no gradient.

Precision. The output has the dtype of g; autocast has no effect inside. float64 is computed in
float64. Otherwise logits, sums of exponentials, counts and intermediate products are float32:

- float16 is computed in float32 (softmax attention only if a gradient is needed). Results and
  gradients beyond its range are clamped to +-65504, never infinite. A clamped result has no
  gradient.
- bfloat16 weights of softmax attention are rounded to bfloat16 before they multiply the values, as
  in fused kernels. The other two compute bfloat16 in float32.

Inputs up to a thousand give no NaN or infinity in any dtype; products beyond float32's own range of
3e38 are not handled. A NaN or infinity in the input is never hidden: wherever the dense weights
would give a result that is not finite, so is this one.

Transformations. Eager mode uses the implementation that needs the least memory. Under
``torch.jit.trace``, ``torch.export`` and ``torch.compile`` the same output is computed by ordinary
operators of any size: PyTorch's fused attention, two products, or a sort and prefix sums.
``torch.jit.script`` chooses among ordinary operators at run time. ONNX has no ``searchsorted``, and
older versions no fused attention: there concatenation and softmax attention are dense.
`torch.func`'s grad, vjp and vmap work, and so do second derivatives; both compute tiles with the
dense weights. Forward-mode derivatives (jvp) are not implemented for tiles, hinge sums and long
products. torch.fx cannot trace through a block: name it a leaf module.
Scripted or traced, a function follows the autocast state it runs under, and only float16 results,
not gradients, are clamped.

Paper: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018, section 3.2.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .capture import is_tracing_or_compiling
from .casting import is_autocast, saturating_cast, upcast
from .dense_weights import (
    concatenation_weights,
    dot_product_weights,
    one_over_keys,
    softmax_weights,
)
from .hinge_sums import hinge_sums, hinge_sums_composite
from .matmul import upcast_matmul
from .tiled_softmax import tiled_softmax_attention


def softmax_attention(
    theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor], scale: float
) -> Tensor:
    """Attention output under `softmax_weights`, (B, V, N).

    Args:
        theta: Queries, (B, D, N).
        phi: Keys, (B, D, M).
        g: Values, (B, V, M).
        mask: Boolean (B, M), True at valid keys, or None for all.
        scale: Factor of the logits; 1 as in the paper.
    """
    dtype = torch.promote_types(torch.promote_types(theta.dtype, phi.dtype), g.dtype)
    needs_grad = torch.is_grad_enabled() and (
        theta.requires_grad or phi.requires_grad or g.requires_grad
    )
    if dtype == torch.float16 and needs_grad:
        dtype = torch.float32
    out_dtype = g.dtype
    theta, phi, g = upcast(theta, dtype), upcast(phi, dtype), upcast(g, dtype)
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            weights = softmax_weights(theta, phi, mask, scale)
            return saturating_cast(upcast_matmul(g, weights.transpose(1, 2)), out_dtype)
        if _tiles_are_faster(theta, phi, g, needs_grad):
            y = tiled_softmax_attention(theta * scale, phi, g, mask)
            return saturating_cast(y, out_dtype)
    return saturating_cast(_fused_attention(theta, phi, g, mask, scale), out_dtype)


def _tiles_are_faster(theta: Tensor, phi: Tensor, g: Tensor, needs_grad: bool) -> bool:
    """Whether to avoid the fused kernels: on a CPU, with gradients or unequal widths.

    Their backward is as fast, but 15 times slower among denormal numbers; see `tiled_softmax`.
    """
    return (
        not is_tracing_or_compiling()
        and theta.device.type == "cpu"
        and theta.dtype in (torch.float32, torch.float64)
        and (needs_grad or phi.shape[1] != g.shape[1])
    )


def _fused_attention(
    theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor], scale: float
) -> Tensor:
    """PyTorch's scaled dot-product attention, with inputs that its fused kernels support.

    That is four dimensions, contiguous rows of widths as in `_fused_widths`, and a valid key in
    each row. Otherwise PyTorch silently falls back to the dense implementation.
    """
    width, value_width = _fused_widths(theta.device.type, phi.shape[1], g.shape[1])
    query, key, value = _rows(theta, width), _rows(phi, width), _rows(g, value_width)
    allowed: Optional[Tensor] = None
    if mask is not None:
        allowed = (mask | ~mask.any(dim=1, keepdim=True)).unsqueeze(1).unsqueeze(1)
    y = _attention(query, key, value, allowed, scale)
    y = y.squeeze(1).transpose(1, 2)[:, : g.shape[1]]
    return y if mask is None else y.masked_fill(~mask.any(dim=1).view(-1, 1, 1), 0.0)


def _fused_widths(device: str, width: int, value_width: int) -> tuple[int, int]:
    """Widths of keys and values that fused kernels take: equal on a CPU, else multiples of 8."""
    if device == "cpu":
        widest = max(width, value_width)
        return widest, widest
    return (width + 7) // 8 * 8, (value_width + 7) // 8 * 8


def _rows(x: Tensor, width: int) -> Tensor:
    """(B, D, N) to contiguous (B, 1, N, D), padded with zeros to ``width`` if that is more."""
    rows = x.transpose(1, 2).unsqueeze(1)
    if width > x.shape[1]:
        return F.pad(rows, (0, width - x.shape[1]))
    return rows.contiguous()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Optional[Tensor], scale: float
) -> Tensor:
    """`F.scaled_dot_product_attention`, even under autocast in the dtype of its inputs."""
    if not torch.jit.is_scripting():
        if is_autocast(query):
            with torch.autocast(query.device.type, enabled=False):
                return F.scaled_dot_product_attention(query, key, value, allowed, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, allowed, scale=scale)


def dot_product_attention(theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Attention output under `dot_product_weights`, (B, V, N), in the cheaper order of products."""
    values = upcast(g)
    if _dense_is_cheaper(theta, phi, g):
        y = upcast_matmul(values, dot_product_weights(theta, phi, mask).transpose(1, 2))
        return saturating_cast(y, g.dtype)
    if mask is not None:
        values = values.masked_fill(~mask.unsqueeze(1), 0.0)
    summary = upcast_matmul(values, phi.transpose(1, 2)) * one_over_keys(phi[:, 0], mask)
    return saturating_cast(upcast_matmul(summary, theta), g.dtype)


def _dense_is_cheaper(theta: Tensor, phi: Tensor, g: Tensor) -> bool:
    """Compare multiplications: N M (D + V) in the dense order, D V (N + M) in the other."""
    if is_tracing_or_compiling():
        return False
    width, values = phi.shape[1], g.shape[1]
    queries, keys = theta.shape[2], phi.shape[2]
    return queries * keys * (width + values) < width * values * (queries + keys)


def concatenation_attention(a: Tensor, b: Tensor, g: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Attention output under `concatenation_weights`, (B, V, N), by sorting; see `hinge_sums`.

    If the weights are no larger than the values they are materialized, which is then faster.
    """
    queries, keys, values = upcast(a), upcast(b), upcast(g)
    if _dense_is_faster(a, g):
        y = upcast_matmul(values, concatenation_weights(queries, keys, mask).transpose(1, 2))
        return saturating_cast(y, g.dtype)
    breakpoints = -keys
    if mask is not None:
        breakpoints = breakpoints.masked_fill(~mask, math.inf)
    share = one_over_keys(keys, mask).squeeze(2) + _nan_if_not_finite(keys, values, mask)
    if torch.jit.is_scripting() or is_tracing_or_compiling():
        y = hinge_sums_composite(queries, breakpoints, values, share)
    else:
        y = hinge_sums(queries, breakpoints, values, share)
    return saturating_cast(y, g.dtype)


def _nan_if_not_finite(keys: Tensor, values: Tensor, mask: Optional[Tensor]) -> Tensor:
    """(B, 1): zero; NaN if a valid key or value is, or is infinite and counts in the dense sum.

    Sorted, such a key would lie beyond all queries and have no effect.
    """
    keys = F.relu(keys.detach())
    values = values.detach()
    if mask is not None:
        keys = keys.masked_fill(~mask, 0.0)
        values = values.masked_fill(~mask.unsqueeze(1), 0.0)
    return (keys.sum(dim=1, keepdim=True) + values.sum(dim=[1, 2]).unsqueeze(1)) * 0.0


def _dense_is_faster(a: Tensor, g: Tensor) -> bool:
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            return True
        if is_tracing_or_compiling():
            return False
    return min(a.shape[1], g.shape[2]) <= g.shape[1]
