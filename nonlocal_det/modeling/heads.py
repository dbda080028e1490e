"""Registered heads: detectron2's own, with blocks at the positions of ``MODEL.NONLOCAL``."""

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


class _TakesBlocks:
    """Adds blocks to a head that is an ``nn.Sequential`` running its children in their order.

    ``place[k]`` is after the k-th of the children that match ``counted``. The blocks come after the
    head has initialised itself: the keypoint head fills everything that is named weight.
    """

    target: ClassVar[str]
    counted: ClassVar[str]

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        positions: Sequence[str] = (),
        make_block: BlockFactory = build_block,
        **head: Any,
    ) -> None:
        """``head`` are the arguments of detectron2's head; the others are `insert_non_local`'s."""
        super().__init__(input_shape, **head)
        names = [name for name in self._modules if re.fullmatch(self.counted, name)]
        points = [
            InsertionPoint(self, "", name, position)
            for position in map(parse_position, positions)
            for name in position.select(names, "convolutions")
        ]
        insert_blocks(points, make_block)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = super().from_config(cfg, input_shape)
        return {**head, **position_kwargs(cfg, cls.target)}


@ROI_BOX_HEAD_REGISTRY.register()
class NonLocalFastRCNNConvFCHead(_TakesBlocks, FastRCNNConvFCHead):
    """The box head; ``box_head[k]`` is after its k-th convolution, of which there must be some."""

    target = "box_head"
    counted = r"conv\d+"


@ROI_MASK_HEAD_REGISTRY.register()
class NonLocalMaskRCNNConvUpsampleHead(_TakesBlocks, MaskRCNNConvUpsampleHead):
    """The mask head; ``mask_head[k]`` is after its k-th 3x3 convolution."""

    target = "mask_head"
    counted = r"mask_fcn\d+"


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class NonLocalKRCNNConvDeconvUpsampleHead(_TakesBlocks, KRCNNConvDeconvUpsampleHead):
    """The keypoint head; ``keypoint_head[k]`` is after its k-th 3x3 convolution and ReLU."""

    target = "keypoint_head"
    counted = r"conv_fcn_relu\d+"


@ROI_HEADS_REGISTRY.register()
class NonLocalRes5ROIHeads(Res5ROIHeads):
    """The heads of a C4 model, where res5 runs inside each region; ``res5[k]`` is in there."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        res5, channels = super()._build_res5_block(cfg)
        insert_non_local(nn.ModuleDict({"res5": res5}), **position_kwargs(cfg, "res5"))
        return res5, channels
