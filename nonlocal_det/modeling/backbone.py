"""Registered backbones: detectron2's own, with blocks at the positions of ``MODEL.NONLOCAL``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor

from .block_factory import build_block, position_kwargs
from .padding_mask import register_padding_mask_hooks
from .positions import BlockFactory, PositionError, build_block_at, insert_non_local, parse_position
from .supported_positions import FPN_LEVELS, output_positions


@torch.random.fork_rng(devices=())  # as in `insert_blocks`
def insert_after_outputs(
    backbone: Backbone,
    positions: Sequence[str],
    make_block: BlockFactory = build_block,
    mask_padding: bool = True,
) -> Backbone:
    """Put blocks after named outputs of any detectron2 backbone, in place.

    No existing name changes: the blocks are new children, ``non_local.<output>``, and run when the
    backbone has run. What a backbone computes from an output, as an FPN does a coarser level, it
    computes from that output without its block.

    Args:
        backbone: any backbone, for instance a RegNet, a ViT or an FPN.
        positions: names of outputs, such as ``"p3"``, without an index.
        make_block: as in `insert_non_local`.
        mask_padding: keep what pads a batch out of the blocks; see ``padding``.

    Returns:
        The same backbone.

    Raises:
        PositionError: for an output that the backbone does not have, or that is named twice.
    """
    shapes = backbone.output_shape()
    old = getattr(backbone, "non_local", nn.ModuleDict())
    blocks = nn.ModuleDict()
    for position in map(parse_position, positions):
        name = position.target
        if name not in shapes or position.index is not None:
            raise PositionError(
                f"Position {position.text!r}: the outputs of {type(backbone).__name__} are "
                f"{', '.join(shapes)}; name one, without an index."
            )
        if name in blocks or name in old:
            raise PositionError(f"Position {position.text!r} puts a second block after {name}.")
        like = list(backbone.parameters())[-1]
        block = build_block_at(position, shapes[name].channels, make_block)
        blocks[name] = block.to(like).train(backbone.training)
    if blocks and not old:
        backbone.register_forward_hook(_run_blocks)
        if mask_padding:
            register_padding_mask_hooks(backbone)
    backbone.non_local = nn.ModuleDict({**old, **blocks})
    return backbone


def _run_blocks(
    self: Backbone, inputs: tuple[Tensor], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A forward hook; a typed function of the module scripts, copies and pickles with it."""
    for name, block in self.non_local.items():
        outputs[name] = block(outputs[name])
    return outputs


def nonlocal_resnet(
    *,
    positions: Sequence[str] = (),
    make_block: BlockFactory = build_block,
    mask_padding: bool = True,
    **resnet: Any,
) -> ResNet:
    """detectron2's ``ResNet(**resnet)`` with blocks after residual blocks; see `insert_non_local`.

    With ``mask_padding``, what pads a batch is kept out of the blocks; see ``padding``.

    Raises:
        PositionError: also for a position in a stage that ``freeze_at`` freezes.
    """
    return _insert_into_resnet(ResNet(**resnet), positions, make_block, mask_padding)


def _insert_into_resnet(
    resnet: ResNet, positions: Sequence[str], make_block: BlockFactory, mask_padding: bool
) -> ResNet:
    stages = {name: getattr(resnet, name) for name in resnet.stage_names}
    free = [n for n, stage in stages.items() if any(p.requires_grad for p in stage.parameters())]
    for position in map(parse_position, positions):
        if position.target in stages and position.target not in free:
            raise PositionError(
                f"Position {position.text!r}: {position.target} is frozen, and a block there would "
                f"not be. Lower MODEL.BACKBONE.FREEZE_AT, or choose from {', '.join(free)}."
            )
    if insert_non_local(resnet, positions, make_block) and mask_padding:
        register_padding_mask_hooks(resnet)
    return resnet


class NonLocalFPN(FPN):
    """detectron2's FPN with blocks after its outputs; see `insert_after_outputs`."""

    def __init__(
        self,
        *,
        positions: Sequence[str] = (),
        make_block: BlockFactory = build_block,
        mask_padding: bool = True,
        **fpn: Any,
    ) -> None:
        """``fpn`` are the arguments of detectron2's FPN."""
        super().__init__(**fpn)
        insert_after_outputs(self, positions, make_block, mask_padding)


@BACKBONE_REGISTRY.register()
def build_nonlocal_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """detectron2's ResNet with blocks after residual blocks, of stages that are not frozen."""
    resnet = build_resnet_backbone(cfg, input_shape)
    # Of a C4 model, res5 is in the head, and so are its blocks.
    return _insert_into_resnet(resnet, **_insertion_kwargs(cfg, *resnet.stage_names))


@BACKBONE_REGISTRY.register()
def build_nonlocal_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> NonLocalFPN:
    """The ResNet-FPN of Mask R-CNN with blocks in the ResNet and after the FPN's outputs."""
    return _build_fpn(cfg, input_shape, lambda bottom_up: LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_nonlocal_retinanet_resnet_fpn_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> NonLocalFPN:
    """The ResNet-FPN of RetinaNet, likewise."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _build_fpn(
        cfg,
        input_shape,
        lambda bottom_up: LastLevelP6P7(bottom_up.output_shape()["res5"].channels, channels),
    )


def _build_fpn(
    cfg: CfgNode, input_shape: ShapeSpec, make_top: Callable[[ResNet], nn.Module]
) -> NonLocalFPN:
    bottom_up = build_nonlocal_resnet_backbone(cfg, input_shape)
    return NonLocalFPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=make_top(bottom_up),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        **_insertion_kwargs(cfg, *FPN_LEVELS),
    )


@BACKBONE_REGISTRY.register()
def build_nonlocal_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Any registered backbone, ``MODEL.NONLOCAL.BACKBONE``, with blocks after its outputs."""
    insertion = _insertion_kwargs(cfg, *output_positions(cfg))
    backbone = BACKBONE_REGISTRY.get(cfg.MODEL.NONLOCAL.BACKBONE)(cfg, input_shape)
    return insert_after_outputs(backbone, **insertion)


def _insertion_kwargs(cfg: CfgNode, *places: str) -> dict[str, Any]:
    """The arguments of a backbone that takes blocks at ``places``."""
    mask_padding = cfg.MODEL.NONLOCAL.MASK_PADDING
    return {**position_kwargs(cfg, *places), "mask_padding": mask_padding}
