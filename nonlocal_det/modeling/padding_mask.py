"""Keeps what pads a batch out of the blocks.

detectron2 normalises images, then pads them with zeros to the right and below: to the largest of
the batch, and one alone to a multiple of 32. A block that looked there would make an image's
features depend on what it is batched with.

A backbone gets the padded batch and no sizes, so they are read off the batch: padding is the rows
and columns at the end that are zero in every channel. This needs no meta-architecture of its own,
and is traced, scripted and exported with the backbone.

Limits: rows or columns at an image's end of nothing but ``MODEL.PIXEL_MEAN``, exactly, are taken
for padding. The default mean is no whole number, which pixels are; with a mean of zero, a black bar
there takes no part, alone as in any batch. And the convolutions of the network itself see the
padding as far as their kernels reach, as in detectron2's own models.
"""

from __future__ import annotations

import torch
from detectron2.modeling import Backbone
from torch import Tensor

from ..layers.pairwise import is_tracing_or_compiling


def register_padding_mask_hooks(backbone: Backbone) -> Backbone:
    """Make each call of the backbone hand its blocks the mask of its images, and take it back."""
    backbone.register_forward_pre_hook(_set_masks)
    backbone.register_forward_hook(_clear_masks)
    return backbone


def valid_pixel_mask(batch: Tensor) -> Tensor:
    """(B, C, H, W), zero-padded to the right and below, to boolean (B, H, W): True on images."""
    rows, columns = _until_last(batch, [1, 3]), _until_last(batch, [1, 2])
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _until_last(batch: Tensor, across: list[int]) -> Tensor:
    """(B, L), L the dimension left: True up to the last place where anything is not zero."""
    filled = (batch.amax(dim=across) != 0) | (batch.amin(dim=across) != 0)
    return filled.flip(1).long().cumsum(1).flip(1) > 0


# Hooks: typed functions of the module script, copy and pickle with it.


def _set_masks(self: Backbone, inputs: tuple[Tensor]) -> None:
    inside = valid_pixel_mask(inputs[0])
    # Without padding, the kernels without a mask; but a recording is of images with and without.
    padded = is_tracing_or_compiling() or not bool(inside.all())
    for module in self.modules():
        if hasattr(module, "pixel_mask"):
            module.pixel_mask = inside if padded else inside.new_zeros(0)


def _clear_masks(
    self: Backbone, inputs: tuple[Tensor], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    for module in self.modules():
        if hasattr(module, "pixel_mask"):
            module.pixel_mask = inputs[0].new_zeros(0, dtype=torch.bool)
    return outputs
