"""Masking of padding in the blocks of a backbone.

detectron2 normalizes images, then pads them with zeros to the right and below: to the largest size
in the batch, and a single image to a multiple of 32. A block that attended to padding would make an
image's features depend on the batch it is in.

A backbone gets the padded batch without image sizes, so they are inferred: padding is the trailing
rows and columns that are zero in every channel. This needs no custom meta-architecture, and is
traced, scripted and exported with the backbone.

Limitations: trailing rows or columns of an image that equal ``MODEL.PIXEL_MEAN`` exactly are taken
for padding. The default mean is not an integer, as pixels are; with a mean of zero, a black bar
there is masked, whatever the batch. The convolutions of the network itself still see the padding
within their kernels, as in detectron2's own models.
"""

from __future__ import annotations

import torch
from detectron2.modeling import Backbone
from torch import Tensor

from ..layers.capture import is_tracing_or_compiling


def register_padding_mask_hooks(backbone: Backbone) -> Backbone:
    """Register hooks that set the blocks' ``pixel_mask`` during each call of the backbone."""
    backbone.register_forward_pre_hook(_set_masks)
    backbone.register_forward_hook(_clear_masks)
    return backbone


def valid_pixel_mask(batch: Tensor) -> Tensor:
    """Infer the mask, boolean (B, H, W), True on real pixels, of a zero-padded (B, C, H, W)."""
    rows, columns = _until_last(batch, [1, 3]), _until_last(batch, [1, 2])
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _until_last(batch: Tensor, across: list[int]) -> Tensor:
    """(B, L), L the remaining dimension: True up to the last index with a nonzero value."""
    filled = (batch.amax(dim=across) != 0) | (batch.amin(dim=across) != 0)
    return filled.flip(1).long().cumsum(1).flip(1) > 0


# The hooks are typed module-level functions, so that the backbone can be scripted and pickled.


def _set_masks(self: Backbone, inputs: tuple[Tensor]) -> None:
    valid = valid_pixel_mask(inputs[0])
    # Without padding, kernels without a mask are used; a trace must serve images with and without.
    padded = is_tracing_or_compiling() or not bool(valid.all())
    for module in self.modules():
        if hasattr(module, "pixel_mask"):
            module.pixel_mask = valid if padded else valid.new_zeros(0)


def _clear_masks(
    self: Backbone, inputs: tuple[Tensor], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    for module in self.modules():
        if hasattr(module, "pixel_mask"):
            module.pixel_mask = inputs[0].new_zeros(0, dtype=torch.bool)
    return outputs
