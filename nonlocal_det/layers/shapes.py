"""Shapes that all mechanisms share: convolutions by dimension, input checks and reshapes."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn as nn
from torch import Tensor

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def check_input(x: Tensor, mask: Optional[Tensor], dims: int) -> None:
    """Raise a ValueError unless ``x`` is (B, C, *S) and ``mask`` a boolean (B, *S) or None."""
    if x.dim() != dims + 2:
        raise ValueError(
            f"x has {x.dim()} dimensions; a block with dims={dims} takes {dims + 2}: "
            "batch, channels, space."
        )
    if mask is not None:
        expected = x.shape[:1] + x.shape[2:]
        if mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(
                f"mask is {mask.dtype} of shape {list(mask.shape)}; it must be boolean "
                f"of shape {list(expected)}, True at valid positions."
            )


def split_channel_groups(x: Tensor, groups: int) -> Tensor:
    """(B, C, *S) to (B, groups, C / groups, N)."""
    # Not unflatten, which ONNX's opset 11, that of detectron2's exports, does not have.
    flat = x.flatten(2)
    return flat.reshape([x.shape[0], groups, x.shape[1] // groups, flat.shape[2]])


def unflatten_spatial(x: Tensor, like: Tensor) -> Tensor:
    """(B, D, N) to (B, D, *S), with the *S of ``like``, (B, C, *S)."""
    return x.reshape(x.shape[:2] + like.shape[2:])
