"""Masks of valid positions, and max-pooling, means and resizing that respect them."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_max_pool(x: Tensor, stride: int, mask: Optional[Tensor]) -> Tensor:
    """Max-pool (B, C, *S) by ``stride`` in space, over the positions that ``mask`` leaves.

    Borders are rounded up. The first of three dimensions is time and stays. A cell without a
    position that takes part becomes 0.
    """
    if stride == 1:
        return x
    if mask is None:
        return _max_pool(x, stride)
    pooled = _max_pool(x.masked_fill(~mask.unsqueeze(1), float("-inf")), stride)
    # By the mask: onnxruntime has kernels that do not give -inf for a cell of nothing but -inf.
    return pooled.masked_fill(_max_pool(float_mask(x, mask), stride) == 0, 0.0)


def _max_pool(x: Tensor, stride: int) -> Tensor:
    if x.dim() == 3:
        return F.max_pool1d(x, stride, ceil_mode=True)
    if x.dim() == 4:
        return F.max_pool2d(x, stride, ceil_mode=True)
    return F.max_pool3d(x, [1, stride, stride], ceil_mode=True)


def downsample_mask(mask: Optional[Tensor], stride: int = 1) -> Optional[Tensor]:
    """(B, *S) to (B, M): the cells of `pool` with at least one position that takes part."""
    if mask is None:
        return None
    if stride > 1:
        mask = _max_pool(mask.unsqueeze(1).float(), stride) > 0
    return mask.flatten(1)


def resize_mask(pixel_mask: Tensor, x: Tensor) -> Tensor:
    """(B, H, W) at the resolution of the images to that of x, (B, C, h, w).

    A network that rounds up what it halves has, at stride s, the cells whose first pixel is a
    multiple of s. Of another network it is the nearest pixel.
    """
    mask = pixel_mask
    while mask.shape[1] > x.shape[2]:
        mask = mask[:, ::2, ::2]
    if mask.shape[1:] == x.shape[2:]:
        return mask
    return F.interpolate(pixel_mask.unsqueeze(1).float(), x.shape[2:]).squeeze(1) > 0


def float_mask(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    """(B, 1, *S) in the dtype of x (B, C, *S): 1 where a position takes part, 0 elsewhere."""
    return torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x.dtype)


# ONNX's opset 11, to which detectron2 exports, has no unflatten.
