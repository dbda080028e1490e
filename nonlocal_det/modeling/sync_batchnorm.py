"""Batch norm over all processes, where torch's own does not run: it needs GPUs."""

from __future__ import annotations

import logging

import torch.nn as nn
from detectron2.layers import NaiveSyncBatchNorm
from torch import Tensor

from ..layers.casting import saturating_cast, upcast


class NaiveSyncBatchNormFP32(NaiveSyncBatchNorm):
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
        return saturating_cast(super().forward(upcast(x)), x.dtype)


def convert_sync_batchnorm_for_cpu(model: nn.Module) -> nn.Module:
    """Replace each SyncBN of a model by `NaiveSyncBatchNormFP32` with the same parameters."""
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


def _wide(norm: nn.SyncBatchNorm) -> NaiveSyncBatchNormFP32:
    wide = NaiveSyncBatchNormFP32(norm.num_features)
    wide.eps, wide.momentum, wide.training = norm.eps, norm.momentum, norm.training
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        setattr(wide, name, tensor)
    return wide
