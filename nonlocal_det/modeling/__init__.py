"""Backbones and heads with non-local blocks; importing this registers them in detectron2."""

from ..utils.deprecation import renamed_attributes
from . import heads
from .backbone import (
    NonLocalFPN,
    build_nonlocal_backbone,
    build_nonlocal_resnet_backbone,
    build_nonlocal_resnet_fpn_backbone,
    build_nonlocal_retinanet_resnet_fpn_backbone,
    insert_after_outputs,
    nonlocal_resnet,
)
from .block_factory import nonlocal_block_factory
from .padding_mask import register_padding_mask_hooks
from .positions import PositionError, insert_non_local

__getattr__ = renamed_attributes(__name__, {"block_maker": "nonlocal_block_factory"})
