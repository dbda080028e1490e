"""Synchronized batch norm on CPUs, where torch's own does not run."""

from __future__ import annotations

import logging

import torch.nn as nn
from detectron2.layers import NaiveSyncBatchNorm
from torch import Tensor

from ..layers.casting import saturating_cast, upcast


class NaiveSyncBatchNormFP32(NaiveSyncBatchNorm):
    """detectron2's naiveSyncBN with statistics in float32 or better, whatever the input dtype.

    Each process is weighted by its number of images or RoIs, which may be zero. Every image has the
    same weight whatever its size, which is detectron2's own approximation.

    Args:
        channels: Number of channels, C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, stats_mode="N")

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W); shape and dtype are kept."""
        return saturating_cast(super().forward(upcast(x)), x.dtype)


def convert_sync_batchnorm_for_cpu(model: nn.Module) -> nn.Module:
    """Replace each SyncBN of a model, in place, by `NaiveSyncBatchNormFP32` of equal parameters."""
    replaced = 0
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.SyncBatchNorm):
                setattr(parent, name, _naive(norm))
                replaced += 1
    if replaced:
        logging.getLogger("detectron2").info(
            f"SyncBN runs on GPUs only: naiveSyncBN replaces it in {replaced} layers."
        )
    return model


def _naive(norm: nn.SyncBatchNorm) -> NaiveSyncBatchNormFP32:
    naive = NaiveSyncBatchNormFP32(norm.num_features)
    naive.eps, naive.momentum, naive.training = norm.eps, norm.momentum, norm.training
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        setattr(naive, name, tensor)
    return naive
