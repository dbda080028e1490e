"""What `AttentionRecorder` keeps of one call of a model, and where its cells lie.

Shape symbols: N RoIs of an image. Sizes are (width, height), unlike detectron2's ``image_size``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from .geometry import Grid, image_grid, roi_grid


@dataclass(frozen=True)
class ImageSize:
    """Size of one image of the call.

    Attributes:
        original: (width, height) before resizing, in pixels.
        resized: (width, height) after resizing, before padding, in pixels.
    """

    original: tuple[int, int]
    resized: tuple[int, int]

    @classmethod
    def from_input(cls, image: Any) -> ImageSize:
        """Read the sizes from a detectron2 input dict, or from an image tensor (3, H, W).

        The ``image`` of a dict is resized; its ``height`` and ``width`` are the original ones.
        """
        if isinstance(image, Tensor):
            return cls(size_of(image), size_of(image))
        width, height = resized = size_of(image["image"])
        return cls((int(image.get("width", width)), int(image.get("height", height))), resized)


@dataclass(frozen=True)
class PooledRoIs:
    """RoIs of one RoI pooling call.

    Attributes:
        boxes: For each image boxes (x0, y0, x1, y1) in pixels of the resized image, shape (N, 4).
        pooled: (width, height) of the pooled features of a RoI, in cells.
    """

    boxes: list[np.ndarray]
    pooled: tuple[int, int]

    @classmethod
    def from_pooler(
        cls, pooler: Union[ROIPooler, MultiScaleRoIAlign], boxes: list[Union[Boxes, Tensor]]
    ) -> PooledRoIs:
        """Copy the boxes: detectron2's post-processing scales those of detections in place."""
        tensors = [b.tensor if isinstance(b, Boxes) else b for b in boxes]
        copies = [tensor.detach().cpu().numpy().copy() for tensor in tensors]
        return cls(copies, tuple(pooler.output_size[::-1]))

    def batch_index(self, image_index: int, roi_index: int) -> int:
        """Index of a RoI in the batch of a head, which holds the RoIs of all images in order."""
        return roi_index + sum(map(len, self.boxes[:image_index]))


@dataclass(frozen=True)
class BlockCall:
    """Input of a block.

    Attributes:
        x: Features (B, C, H, W).
        mask: Mask of the valid positions, or None.
        rois: RoIs that make up the batch, for a block in a head; otherwise None.
    """

    x: Tensor
    mask: Optional[Tensor]
    rois: Optional[PooledRoIs]

    def batch_of_one(
        self, image_index: int, roi_index: Optional[int]
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The features and mask of one image, or of one of its RoIs."""
        index = image_index
        if self.rois is not None:
            index = self.rois.batch_index(image_index, roi_index)
        mask = None if self.mask is None else self.mask[index : index + 1]
        return self.x[index : index + 1], mask


@dataclass
class RecordedCall:
    """One call of a model, or of parts of it.

    Attributes:
        image_sizes: Size of each image of the batch; None if only parts of the model were called.
        padded: (width, height) of the padded batch in pixels; None if it is unknown.
        rois: RoIs of the latest RoI pooling.
        block_calls: Latest call of each block that ran, by name.
    """

    image_sizes: Optional[list[ImageSize]] = None
    padded: Optional[tuple[int, int]] = None
    rois: Optional[PooledRoIs] = None
    block_calls: dict[str, BlockCall] = field(default_factory=dict)

    def block_call(self, block: str) -> BlockCall:
        """The latest call of a block.

        Raises:
            KeyError: If the block was not recorded; the message lists the recorded ones.
        """
        if block not in self.block_calls:
            recorded = ", ".join(self.block_calls) or "none; call the model inside the context"
            raise KeyError(f"No block {block!r} was recorded. Recorded: {recorded}.")
        return self.block_calls[block]

    def image_size(self, image_index: int) -> ImageSize:
        """The size of an image.

        Raises:
            IndexError: If the batch has no such image.
            ValueError: If the sizes are unknown.
        """
        if self.image_sizes is None:
            raise ValueError(
                "The sizes of the recorded images are unknown: only parts of the model were "
                "called, or none. Call the model itself, model(inputs), inside the context."
            )
        if not 0 <= image_index < len(self.image_sizes):
            raise IndexError(
                f"There is no image {image_index}: the recorded call has {len(self.image_sizes)}."
            )
        return self.image_sizes[image_index]

    def roi_boxes(self, block: str, image_index: int) -> Optional[np.ndarray]:
        """The RoIs of a block in a head, shape (N, 4), in pixels of the original image."""
        rois, size = self.block_call(block).rois, self.image_size(image_index)
        if rois is None:
            return None
        return rois.boxes[image_index] * np.tile(np.divide(size.original, size.resized), 2)

    def grid(self, block: str, image_index: int, roi_index: Optional[int]) -> Grid:
        """The grid of a block's queries, over an image or over one of its RoIs.

        Raises:
            ValueError: If the block is in a head and ``roi_index`` is None, or if it is not and the
                padded size is unknown.
        """
        call, size = self.block_call(block), self.image_size(image_index)
        if call.rois is None:
            if self.padded is None:
                raise ValueError(
                    "The size of the padded batch is unknown: the model is neither of detectron2 "
                    "nor a detector of torchvision. Call such a model with a tensor."
                )
            return image_grid(size_of(call.x), self.padded, size.resized, size.original)
        if roi_index is None:
            raise ValueError(f"{block} is in a head and runs on RoIs; give roi_index.")
        box = self.roi_boxes(block, image_index)[roi_index]
        return roi_grid(size_of(call.x), call.rois.pooled, box)


def size_of(x: Tensor) -> tuple[int, int]:
    """(width, height) of a tensor (..., H, W)."""
    return int(x.shape[-1]), int(x.shape[-2])
