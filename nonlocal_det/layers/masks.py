"""Masks of valid positions: pooling under them, and their own downsampling and resizing."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_max_pool(x: Tensor, stride: int, mask: Optional[Tensor]) -> Tensor:
    """Max-pool over the valid positions of each cell, in space.

    Args:
        x: Features, (B, C, *S). The first of three spatial dimensions is time and is not pooled.
        stride: Side of a cell. Incomplete cells at the far borders are kept.
        mask: Boolean (B, *S), True at valid positions, or None for all.

    Returns:
        Pooled features, 0 in a cell without a valid position.
    """
    if stride == 1:
        return x
    if mask is None:
        return _max_pool(x, stride)
    pooled = _max_pool(x.masked_fill(~mask.unsqueeze(1), float("-inf")), stride)
    # By the mask, not by -inf: some kernels of onnxruntime do not return -inf for such a cell.
    return pooled.masked_fill(_max_pool(float_mask(x, mask), stride) == 0, 0.0)


def _max_pool(x: Tensor, stride: int) -> Tensor:
    if x.dim() == 3:
        return F.max_pool1d(x, stride, ceil_mode=True)
    if x.dim() == 4:
        return F.max_pool2d(x, stride, ceil_mode=True)
    return F.max_pool3d(x, [1, stride, stride], ceil_mode=True)


def downsample_mask(mask: Optional[Tensor], stride: int = 1) -> Optional[Tensor]:
    """(B, *S) to (B, M): True at the cells of `masked_max_pool` with a valid position."""
    if mask is None:
        return None
    if stride > 1:
        mask = _max_pool(mask.unsqueeze(1).float(), stride) > 0
    return mask.flatten(1)


def resize_mask(pixel_mask: Tensor, x: Tensor) -> Tensor:
    """Resize a mask (B, H, W) from the resolution of the images to that of x, (B, C, h, w).

    A network that halves with rounding up has, at stride s, the cells that start at a multiple of
    s: these pixels are taken. For any other size it is the nearest pixel.
    """
    mask = pixel_mask
    while mask.shape[1] > x.shape[2]:
        mask = mask[:, ::2, ::2]
    if mask.shape[1:] == x.shape[2:]:
        return mask
    return F.interpolate(pixel_mask.unsqueeze(1).float(), x.shape[2:]).squeeze(1) > 0


def float_mask(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    """(B, 1, *S) in the dtype of x (B, C, *S): 1 at valid positions, 0 elsewhere."""
    return torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x.dtype)
