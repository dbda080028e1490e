"""Hooks that record the calls of a model: its images, RoIs, and the inputs of its blocks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Optional

import torch.nn as nn
from detectron2.modeling import Backbone
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torchvision.ops import MultiScaleRoIAlign

from ...layers.base import NonLocalBase
from .recorded_call import BlockCall, ImageSize, PooledRoIs, RecordedCall, size_of


class CallHooks:
    """Hooks on a model and its parts, which record each call of it in place of the previous one.

    Args:
        model: The model.
        blocks: Its non-local blocks by name.

    Attributes:
        call: The latest call, of the model or of parts of it.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, NonLocalBase]) -> None:
        self._model = model
        self._blocks = blocks
        self._handles: list[RemovableHandle] = []
        self._is_called = False  # by ``model(inputs)``, at present
        self.call = RecordedCall()

    def attach(self) -> None:
        """Start to record."""
        modules = list(self._model.modules())
        self._before(self._model, self._on_model)
        after = self._model.register_forward_hook(self._after_model, always_call=True)
        self._handles.append(after)
        # The outermost backbone gets the padded batch.
        for backbone in [m for m in modules if isinstance(m, Backbone)][:1]:
            self._before(backbone, self._on_backbone)
        for pooler in (m for m in modules if isinstance(m, (ROIPooler, MultiScaleRoIAlign))):
            self._before(pooler, partial(self._on_pooler, pooler))
        for transform in filter(_is_torchvision_transform, modules):
            self._handles.append(transform.register_forward_hook(self._after_transform))
        for name, block in self._blocks.items():
            self._before(block, partial(self._on_block, name))

    def detach(self) -> None:
        """Remove all hooks."""
        self._is_called = False
        while self._handles:
            self._handles.pop().remove()

    def _before(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Call ``hook`` with the arguments of each call of the module, before it."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            hook(*bound.args, **bound.kwargs)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def _on_model(self, images: Any, *_: Any, **__: Any) -> None:
        self._is_called = True
        self.call = RecordedCall([ImageSize.from_input(image) for image in images])
        if isinstance(images, Tensor):
            self.call.padded = size_of(images)

    def _after_model(self, *_: Any) -> None:
        self._is_called = False

    def _on_backbone(self, images: Tensor, *_: Any, **__: Any) -> None:
        if not self._is_called:
            self.call = RecordedCall()
        self.call.padded = size_of(images)
        self.call.rois = None

    def _after_transform(self, _: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        """Torchvision's detectors get their images as they are, and resize and pad them."""
        (images, *_), (batch, *_) = inputs, outputs
        self._part().image_sizes = [
            ImageSize(size_of(image), (width, height))
            for image, (height, width) in zip(images, batch.image_sizes)
        ]
        self.call.padded = size_of(batch.tensors)

    def _on_pooler(self, pooler: nn.Module, _: Any, boxes: list[Any], *__: Any) -> None:
        self._part().rois = PooledRoIs.from_pooler(pooler, boxes)

    def _on_block(self, name: str, x: Tensor, mask: Optional[Tensor] = None) -> None:
        # A block called after a pooler runs on its RoIs, until the next call of the backbone.
        call, mask = self._part(), self._blocks[name].resolve_mask(x, mask)
        call.block_calls[name] = BlockCall(x.detach(), mask, call.rois)

    def _part(self) -> RecordedCall:
        """The call that a part of the model runs in; not an earlier call of the model."""
        if not self._is_called and self.call.image_sizes is not None:
            self.call = RecordedCall()
        return self.call


def _is_torchvision_transform(module: nn.Module) -> bool:
    """Whether a module is the transform of torchvision's detectors, if they are imported at all."""
    detection = sys.modules.get("torchvision.models.detection.transform")
    return detection is not None and isinstance(module, detection.GeneralizedRCNNTransform)
