"""Registered heads: those of detectron2, with blocks at the configured positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn as nn
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
)

from .block_factory import build_block, position_kwargs
from .positions import BlockFactory, InsertionPoint, insert_blocks, insert_non_local, parse_position


class _NonLocalHeadMixin:
    """Adds blocks to a head that is an ``nn.Sequential``.

    Blocks are added after the head has initialized itself, because the keypoint head initializes
    every parameter named weight.

    Attributes:
        target: Target of the head's positions; ``target[k]`` is after its k-th convolution.
        conv_pattern: Regular expression for the names of these convolutions.
    """

    target: ClassVar[str]
    conv_pattern: ClassVar[str]

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        positions: Sequence[str] = (),
        make_block: BlockFactory = build_block,
        **head: Any,
    ) -> None:
        """Build the head, then add the blocks.

        Args:
            input_shape: Shape of the RoI features.
            positions: Positions of blocks, such as ``"mask_head[-1]"``.
            make_block: Factory of blocks; see `insert_non_local`.
            head: Arguments of detectron2's head.
        """
        super().__init__(input_shape, **head)
        names = [name for name in self._modules if re.fullmatch(self.conv_pattern, name)]
        points = [
            InsertionPoint(self, "", name, position)
            for position in map(parse_position, positions)
            for name in position.select(names, "convolutions")
        ]
        insert_blocks(points, make_block)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments of the constructor, from a configuration."""
        head = super().from_config(cfg, input_shape)
        return {**head, **position_kwargs(cfg, cls.target)}


@ROI_BOX_HEAD_REGISTRY.register()
class NonLocalFastRCNNConvFCHead(_NonLocalHeadMixin, FastRCNNConvFCHead):
    """Box head with blocks; ``box_head[k]`` is after the k-th convolution (``NUM_CONV`` > 0)."""

    target = "box_head"
    conv_pattern = r"conv\d+"


@ROI_MASK_HEAD_REGISTRY.register()
class NonLocalMaskRCNNConvUpsampleHead(_NonLocalHeadMixin, MaskRCNNConvUpsampleHead):
    """Mask head with blocks; ``mask_head[k]`` is after the k-th 3x3 convolution."""

    target = "mask_head"
    conv_pattern = r"mask_fcn\d+"


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class NonLocalKRCNNConvDeconvUpsampleHead(_NonLocalHeadMixin, KRCNNConvDeconvUpsampleHead):
    """Keypoint head with blocks; ``keypoint_head[k]`` is after the k-th convolution's ReLU."""

    target = "keypoint_head"
    conv_pattern = r"conv_fcn_relu\d+"


@ROI_HEADS_REGISTRY.register()
class NonLocalRes5ROIHeads(Res5ROIHeads):
    """RoI heads of a C4 model with blocks in res5, which runs on each RoI: ``res5[k]``."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        res5, channels = super()._build_res5_block(cfg)
        insert_non_local(nn.ModuleDict({"res5": res5}), **position_kwargs(cfg, "res5"))
        return res5, channels
