"""Masking of padding in the blocks of a network.

detectron2 and torchvision normalize images, then pad them with zeros to the right and below: to the
largest size in the batch, and a single image to a multiple of 32. A block that attended to padding
would make an image's features depend on the batch it is in.

A network gets the padded batch without image sizes, so they are inferred: padding is the trailing
rows and columns that are zero in every channel. This needs no custom meta-architecture, and is
traced, scripted and exported with the network. `nonlocal_det.layers.pixel_mask` says how the mask
reaches the blocks.

Limitations: trailing rows or columns of an image that equal ``MODEL.PIXEL_MEAN`` exactly are taken
for padding. The default mean is not an integer, as pixels are; with a mean of zero, a black bar
there is masked, whatever the batch. The convolutions of the network itself still see the padding
within their kernels, as in detectron2's own models. A scripted module keeps the mask in its blocks
during a call: it serves one thread at a time, where all other forms serve any number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.base import NonLocalBase
from ..layers.capture import is_tracing_or_compiling
from ..layers.pixel_mask import (
    NO_PIXEL_MASK,
    call_with_pixel_mask,
    current_pixel_mask,
    storage_of,
)


def register_padding_mask_hooks(network: nn.Module) -> nn.Module:
    """Mask the padding of each batch in all blocks of a network, in place.

    Call it after the last block was inserted. The network's class becomes a subclass with the same
    name; parameters and their names stay.

    Args:
        network: Module that is called with a zero-padded batch of normalized images (B, C, H, W),
            such as ``model.backbone`` of a detectron2 or torchvision detector.

    Returns:
        The network itself.
    """
    if not isinstance(network, _MasksPadding):
        network.__class__ = _with_masks(type(network))
        network.register_forward_pre_hook(_set_scripted_masks)
    for part in _checkpointable_parts(network):
        if _remember_mask not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_remember_mask)
    return network


def valid_pixel_mask(batch: Tensor) -> Tensor:
    """Infer the mask, boolean (B, H, W), True on real pixels, of a zero-padded (B, C, H, W)."""
    rows, columns = _until_last(batch, [1, 3]), _until_last(batch, [1, 2])
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _until_last(batch: Tensor, across: list[int]) -> Tensor:
    """(B, L), L the remaining dimension: True up to the last index with a nonzero value."""
    filled = (batch.amax(dim=across) != 0) | (batch.amin(dim=across) != 0)
    return filled.flip(1).long().cumsum(1).flip(1) > 0


class _MasksPadding(nn.Module):
    """A network each of whose calls has a pixel mask. TorchScript does not look at `__call__`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mask = _mask_of_call(self, *args, *kwargs.values())
        return call_with_pixel_mask(mask, partial(super().__call__, *args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the network's own class, which a file can name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_with_masks, (type(self).__bases__[1],), *state


@cache
def _with_masks(kind: type[nn.Module]) -> type[nn.Module]:
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (_MasksPadding, kind), names)


def _new_with_masks(kind: type[nn.Module]) -> nn.Module:
    kind = _with_masks(kind)
    return kind.__new__(kind)


def _mask_of_call(network: nn.Module, *inputs: Any) -> Tensor:
    batch = next((x for x in inputs if isinstance(x, Tensor) and x.dim() == 4), None)
    if batch is None:
        raise TypeError(
            f"{type(network).__name__} masks padding, so it must be called with a batch of images "
            f"(B, C, H, W), not with {', '.join(type(x).__name__ for x in inputs) or 'nothing'}."
        )
    valid = valid_pixel_mask(batch)
    # Without padding, kernels without a mask are used. A GPU would have to be waited for; a capture
    # must serve images with and without padding, and so must a call for each sample of a vmap.
    is_known = batch.device.type == "cpu" and not is_tracing_or_compiling()
    if is_known and storage_of(batch) is not None and bool(valid.all()):
        return NO_PIXEL_MASK
    return valid


def _checkpointable_parts(network: nn.Module) -> Iterator[nn.Module]:
    """Modules that a part of the network with a block in it may start with, if it is run again.

    They are the modules around blocks and the children of those. Blocks find a mask themselves.
    """
    for module in network.modules():
        if any(isinstance(part, NonLocalBase) for part in module.modules() if part is not module):
            parts = (module, *module.children()) if module is not network else module.children()
            yield from filter(_takes_features, parts)


def _takes_features(part: nn.Module) -> bool:
    """Whether a module has one tensor as its input, as a hook must in TorchScript."""
    inputs = list(inspect.signature(type(part).forward).parameters.values())[1:]
    tensor = (inspect.Parameter.empty, Tensor, "Tensor", "torch.Tensor")
    return len(inputs) == 1 and inputs[0].annotation in tensor


# Hooks are typed module-level functions, so that the network can be scripted and pickled.


def _remember_mask(self: nn.Module, inputs: tuple[Tensor]) -> None:
    if not torch.jit.is_scripting():
        current_pixel_mask(inputs[0])


def _set_scripted_masks(self: nn.Module, inputs: tuple[Tensor]) -> None:
    if torch.jit.is_scripting():
        valid = valid_pixel_mask(inputs[0])
        padded = not bool(valid.all())
        for module in self.modules():
            if hasattr(module, "pixel_mask"):
                module.pixel_mask = valid if padded else valid.new_zeros(0)
