"""Batch norm over all processes, where torch's own does not run: it needs GPUs."""

from __future__ import annotations

import logging

import torch.nn as nn
from detectron2.layers import NaiveSyncBatchNorm
from torch import Tensor

from ..layers.precision import narrow, widen


class WideSyncBatchNorm(NaiveSyncBatchNorm):
    """detectron2's naiveSyncBN, with statistics in float32 or better whatever the input.

    Each process counts by its number of pictures or regions, of which it may have none. Maps of
    unequal sizes count alike, which is detectron2's own approximation.

    Args:
        channels: C of an input (B, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, stats_mode="N")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape and dtype."""
        return narrow(super().forward(widen(x)), x.dtype)


def for_cpu(model: nn.Module) -> nn.Module:
    """Put `WideSyncBatchNorm`, with the same parameters, in place of each SyncBN of the model."""
    replaced = 0
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.SyncBatchNorm):
                setattr(parent, name, _wide(norm))
                replaced += 1
    if replaced:
        logging.getLogger("detectron2").info(
            f"SyncBN runs on GPUs only: naiveSyncBN stands in for it in {replaced} layers."
        )
    return model


def _wide(norm: nn.SyncBatchNorm) -> WideSyncBatchNorm:
    wide = WideSyncBatchNorm(norm.num_features)
    wide.eps, wide.momentum, wide.training = norm.eps, norm.momentum, norm.training
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        setattr(wide, name, tensor)
    return wide
