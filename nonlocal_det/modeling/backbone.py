"""Registered backbones: those of detectron2, with blocks at the configured positions."""

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
from .supported_positions import FPN_LEVELS, output_positions, wrapped_backbone


@torch.random.fork_rng(devices=())  # see `insert_blocks`
def insert_after_outputs(
    backbone: Backbone,
    positions: Sequence[str],
    make_block: BlockFactory = build_block,
    mask_padding: bool = True,
) -> Backbone:
    """Add blocks after outputs of any detectron2 backbone, in place.

    Existing parameter names do not change: blocks are added as children ``non_local.<output>`` and
    run after the backbone's forward. Outputs that the backbone derives from one another, such as
    an FPN's p6 from p5, are therefore computed without the block.

    Args:
        backbone: Any backbone, for instance a RegNet, a ViT or an FPN.
        positions: Names of outputs, such as ``"p3"``, without an index.
        make_block: Factory of blocks; see `insert_non_local`.
        mask_padding: Whether to mask padding in the blocks; see
            `nonlocal_det.modeling.padding_mask`.

    Returns:
        The same backbone.

    Raises:
        PositionError: If the backbone does not have an output, or one is given twice.
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
    backbone.non_local = nn.ModuleDict({**old, **blocks})
    if blocks and mask_padding:
        register_padding_mask_hooks(backbone)
    return backbone


def _run_blocks(
    self: Backbone, inputs: tuple[Tensor], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A forward hook: being a typed module-level function, it can be scripted and pickled."""
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
    """Build detectron2's ResNet with blocks after residual blocks.

    Args:
        positions: Positions of blocks, such as ``"res4[-2]"``.
        make_block: Factory of blocks; see `insert_non_local`.
        mask_padding: Whether to mask padding in the blocks; see
            `nonlocal_det.modeling.padding_mask`.
        resnet: Arguments of detectron2's ``ResNet``.

    Raises:
        PositionError: If a position does not exist, is given twice, or is in a frozen stage.
    """
    return _insert_into_resnet(ResNet(**resnet), positions, make_block, mask_padding)


def _insert_into_resnet(
    resnet: ResNet, positions: Sequence[str], make_block: BlockFactory, mask_padding: bool
) -> ResNet:
    stages = {name: getattr(resnet, name) for name in resnet.stage_names}
    trainable = [n for n, s in stages.items() if any(p.requires_grad for p in s.parameters())]
    for position in map(parse_position, positions):
        if position.target in stages and position.target not in trainable:
            raise PositionError(
                f"Position {position.text!r}: {position.target} is frozen, but a block there would "
                f"train. Lower MODEL.BACKBONE.FREEZE_AT, or choose from {', '.join(trainable)}."
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
        """Build the FPN, then add the blocks.

        Args:
            positions: Names of outputs, such as ``"p3"``.
            make_block: Factory of blocks; see `insert_non_local`.
            mask_padding: Whether to mask padding in the blocks.
            fpn: Arguments of detectron2's FPN.
        """
        super().__init__(**fpn)
        insert_after_outputs(self, positions, make_block, mask_padding)


@BACKBONE_REGISTRY.register()
def build_nonlocal_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build detectron2's ResNet with blocks after residual blocks of stages that are not frozen."""
    resnet = build_resnet_backbone(cfg, input_shape)
    # In a C4 model, res5 is in the head, and so are its blocks.
    return _insert_into_resnet(resnet, **_insertion_kwargs(cfg, *resnet.stage_names))


@BACKBONE_REGISTRY.register()
def build_nonlocal_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> NonLocalFPN:
    """Build the ResNet-FPN of Mask R-CNN with blocks in the ResNet and after FPN outputs."""
    return _build_fpn(cfg, input_shape, lambda bottom_up: LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_nonlocal_retinanet_resnet_fpn_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> NonLocalFPN:
    """Build the ResNet-FPN of RetinaNet with blocks in the ResNet and after FPN outputs."""
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
    """Build ``MODEL.NONLOCAL.WRAPPED_BACKBONE``, any registered one, with blocks after outputs."""
    insertion = _insertion_kwargs(cfg, *output_positions(cfg))
    backbone = BACKBONE_REGISTRY.get(wrapped_backbone(cfg))(cfg, input_shape)
    return insert_after_outputs(backbone, **insertion)


def _insertion_kwargs(cfg: CfgNode, *targets: str) -> dict[str, Any]:
    """The arguments of a backbone that supports positions with these targets."""
    mask_padding = cfg.MODEL.NONLOCAL.MASK_PADDING
    return {**position_kwargs(cfg, *targets), "mask_padding": mask_padding}
