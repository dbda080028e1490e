"""Norms by name, and group norm over valid positions only."""

from __future__ import annotations

import math
from typing import Callable, Union

import torch.nn as nn
from torch import Tensor

from ..utils.validation import check_choice
from .casting import upcast
from .shapes import split_channel_groups

Norm = Union[str, Callable[[int], nn.Module]]
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = ("", "BN", "SyncBN", "GN")


def make_norm(norm: Norm, channels: int, dims: int) -> nn.Module:
    """Build a norm for features (B, C, *S).

    Args:
        norm: "BN", "SyncBN", "GN" (32 groups, or as many as divide both 32 and ``channels``), ""
            for none, or a callable from a number of channels to a module.
        channels: Number of channels, C.
        dims: Number of spatial dimensions.

    Raises:
        ValueError: If ``norm`` is another string.
    """
    if callable(norm):
        return norm(channels)
    check_choice("norm", norm, _NORMS)
    if norm == "BN":
        return _BATCH_NORM[dims](channels)
    if norm == "SyncBN":
        return nn.SyncBatchNorm(channels)
    if norm == "GN":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return nn.Identity()


def num_statistics_groups(norm: nn.Module) -> int:
    """Number of channel groups whose statistics a norm takes from each sample, 0 if from none."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    if isinstance(norm, _INSTANCE_NORM) and not norm.track_running_stats:
        return norm.num_features
    return 0


def masked_group_norm(
    x: Tensor, mask: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Group norm with the statistics of valid positions; otherwise as `F.group_norm`.

    Args:
        x: Features, (B, C, *S).
        mask: Boolean (B, *S), True at valid positions.
        groups: Number of channel groups.
        weight: Scale of each channel, (C,).
        bias: Shift of each channel, (C,).
        eps: Value added to the variance.
    """
    grouped = split_channel_groups(upcast(x), groups)
    valid = mask.flatten(1).unsqueeze(1).unsqueeze(1).to(grouped.dtype)
    count = (valid.sum(dim=3, keepdim=True) * grouped.shape[2]).clamp(min=1)
    centered = grouped - (grouped * valid).sum(dim=[2, 3], keepdim=True) / count
    variance = (centered.square() * valid).sum(dim=[2, 3], keepdim=True) / count
    y = (centered * (variance + eps).rsqrt()).flatten(1, 2)
    y = y * weight.unsqueeze(1) + bias.unsqueeze(1)
    return y.view_as(x).to(x.dtype)


def unit_length(x: Tensor) -> Tensor:
    """Scale each column of (B, D, N) to a Euclidean length of one; columns near zero stay small."""
    full = upcast(x)
    # The mean square, not the sum: what counts as near zero must not depend on the width.
    square = full.square().mean(dim=1, keepdim=True)
    return (full * (x.shape[1] * (square + 1e-6)).rsqrt()).to(x.dtype)
