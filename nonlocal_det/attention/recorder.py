"""Record an ordinary inference call, then ask which positions any point of a picture looked at.

    with AttentionRecorder(model) as recorder:
        outputs = model(inputs)
    heat = recorder.attention_maps("backbone.bottom_up.res4.nl4", [(320, 200)])[0]

Inside the context each block's input is kept, by reference; nothing is computed. The weights are
computed when asked for, and only the rows asked for. Outside the context nothing is attached to the
model.

Coordinates are continuous (x, y) in pixels of the original images; see ``geometry``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
import torch.nn as nn
from detectron2.modeling import Backbone
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..layers.base import NonLocalBase
from .geometry import Grid, image_grid, roi_grid

# Rows computed at a time, so that the average over a large box fits in memory.
_CHUNK = 256


@dataclass(frozen=True)
class _ImageSize:
    """(width, height) of one image of the call, before resizing and after it."""

    original: tuple[int, int]
    resized: tuple[int, int]


@dataclass(frozen=True)
class _RoIs:
    """What RoI pooling cut out: (R, 4) of each resized image, to (width, height) cells each."""

    boxes: list[np.ndarray]
    pooled: tuple[int, int]


@dataclass(frozen=True)
class _Call:
    """What a block was called with; ``regions`` is None outside of heads."""

    x: Tensor
    mask: Optional[Tensor]
    regions: Optional[_RoIs]


class AttentionRecorder:
    """A context in which the calls of a model are recorded, each in place of the one before.

    Args:
        model: a detectron2 model, called with its list of dicts; or any network with blocks,
            called with a tensor (B, 3, H, W).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, NonLocalBase) and module.dims == 2
        }
        self._handles: list[RemovableHandle] = []
        self._start([])

    def __enter__(self) -> AttentionRecorder:
        modules = list(self._model.modules())
        self._attach(self._model, self._on_model)
        # The outermost backbone gets the padded batch.
        for backbone in [m for m in modules if isinstance(m, Backbone)][:1]:
            self._attach(backbone, self._on_backbone)
        for pooler in (m for m in modules if isinstance(m, ROIPooler)):
            self._attach(pooler, self._on_pooler)
        for name, block in self._blocks.items():
            self._attach(block, lambda _, args, name=name: self._on_block(name, *args))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _attach(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(hook))

    def _start(self, pictures: list[_ImageSize]) -> None:
        self._pictures = pictures
        self._padded = (0, 0)
        self._regions: Optional[_RoIs] = None
        self._calls: dict[str, _Call] = {}

    def _on_model(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0]
        if isinstance(inputs, Tensor):
            self._start([_ImageSize(_size(inputs), _size(inputs)) for _ in inputs])
            self._padded = _size(inputs)
        else:
            self._start([_image_size_of(entry) for entry in inputs])

    def _on_backbone(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._padded = _size(args[0])

    def _on_pooler(self, pooler: ROIPooler, args: tuple[Any, ...]) -> None:
        # Copies: detectron2's post-processing scales the boxes of the detections in place.
        boxes = [boxes.tensor.detach().cpu().numpy().copy() for boxes in args[1]]
        self._regions = _RoIs(boxes, tuple(pooler.output_size[::-1]))

    def _on_block(self, name: str, x: Tensor, mask: Optional[Tensor] = None) -> None:
        # What runs after a pooler runs on its regions, until the next call of the model.
        mask = self._blocks[name].resolve_mask(x, mask)
        self._calls[name] = _Call(x.detach(), mask, self._regions)

    @property
    def blocks(self) -> list[str]:
        """The names of the model's blocks, in its order."""
        return list(self._blocks)

    @property
    def recorded(self) -> list[str]:
        """Those of ``blocks`` that the latest call reached."""
        return [name for name in self._blocks if name in self._calls]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each image of the latest call."""
        return [picture.original for picture in self._pictures]

    def attention_maps(
        self,
        block: str,
        places: Any,
        *,
        image: int = 0,
        boxes: Optional[Any] = None,
        smooth: bool = True,
    ) -> np.ndarray:
        """What chosen places look at, as maps over the original image.

        The value at a cell's centre is the weight that the block gives to this cell. Weights are
        per cell, not per pixel, and what the block gives to padding is not on the map.

        Args:
            block: one of ``blocks``.
            places: (Q, 2) points (x, y), or (Q, 4) boxes (x0, y0, x1, y1), whose cells' weights are
                averaged.
            image: index in the batch.
            boxes: (Q, 4), for a block in a head, which looks at one region: of which detection. By
                default the smallest region around each place. Other blocks need none.
            smooth: interpolate between the centres of cells; or show the cells.

        Returns:
            (Q, H, W) float32; NaN outside the region for a block in a head.

        Raises:
            KeyError: if the call did not reach such a block, with those it reached.
            ValueError: for a place outside the image, or outside every region.
        """
        rows = self.rows(block, places, image=image, boxes=boxes)
        width, height = self._image_size_of(image).original
        maps = [grid.spread(values[None], width, height, smooth) for values, grid in rows]
        return np.concatenate(maps) if maps else np.zeros((0, height, width), np.float32)

    def strongest(
        self, block: str, place: Any, k: int = 10, *, image: int = 0, box: Optional[Any] = None
    ) -> list[tuple[float, float, float]]:
        """The ``k`` positions that one place gives the largest weights, by magnitude.

        Arguments are those of `attention_maps`, for one place.

        Returns:
            (x, y, weight), the strongest first; (x, y) is the centre of the cell.
        """
        values, grid = self.rows(block, place, image=image, boxes=box)[0]
        return grid.strongest(values, k)

    def rows(
        self, block: str, places: Any, *, image: int = 0, boxes: Optional[Any] = None
    ) -> list[tuple[np.ndarray, Grid]]:
        """For each place the weights (R, C) of the keys, without interpolation, and their grid.

        Arguments and errors are those of `attention_maps`.
        """
        places = _rows_of_numbers(places)
        if self._call(block).regions is None and places.shape[1] == 2:
            cells = self.grid(block, image=image).cells_at(places)
            values, keys = self.weights(block, cells, image=image)
            return [(row, keys) for row in values]
        chosen = [None] * len(places) if boxes is None else _rows_of_numbers(boxes)
        return [
            self._row(block, place, image, self.region(block, place, image=image, box=box))
            for place, box in zip(places, chosen)
        ]

    def _row(
        self, block: str, place: np.ndarray, image: int, region: Optional[int]
    ) -> tuple[np.ndarray, Grid]:
        grid = self.grid(block, image=image, region=region)
        cells = grid.cells_at(place) if len(place) == 2 else grid.cells_in(place)
        total: Any = 0.0
        for start in range(0, len(cells), _CHUNK):
            chunk = cells[start : start + _CHUNK]
            values, keys = self.weights(block, chunk, image=image, region=region)
            total = total + values.sum(axis=0)
        return total / len(cells), keys

    def regions(self, block: str, *, image: int = 0) -> Optional[np.ndarray]:
        """The boxes (R, 4) of the regions that a block in a head ran on; None for other blocks."""
        call, picture = self._call(block), self._image_size_of(image)
        if call.regions is None:
            return None
        scale = np.divide(picture.original, picture.resized)
        return call.regions.boxes[image] * np.tile(scale, 2)

    def grid(self, block: str, *, image: int = 0, region: Optional[int] = None) -> Grid:
        """The cells that ask: of the image, or of one of the `regions`."""
        call, picture = self._call(block), self._image_size_of(image)
        feature = _size(call.x)
        if call.regions is None:
            return image_grid(feature, self._padded, picture.resized, picture.original)
        if region is None:
            raise ValueError(f"{block} runs on regions of the image; say which.")
        box = self.regions(block, image=image)[region]
        return roi_grid(feature, call.regions.pooled, box)

    def weights(
        self, block: str, cells: np.ndarray, *, image: int = 0, region: Optional[int] = None
    ) -> tuple[np.ndarray, Grid]:
        """The weights as the block has them, without interpolation.

        Args:
            block: one of ``blocks``.
            cells: (Q, 2) integers (column, row) of `grid`, the cells that ask.
            image: index in the batch.
            region: index in `regions`, for a block in a head.

        Returns:
            (Q, R, C) and the grid of these R x C keys, without padding.
        """
        grid = self.grid(block, image=image, region=region)
        module, x, mask = self._input(block, image, region)
        queries = torch.as_tensor(cells[:, 1] * x.shape[3] + cells[:, 0], device=x.device)
        with torch.no_grad():
            rows = module.attention_weights(x, queries, mask)[0]
        keys = grid.coarser(getattr(module, "stride", 1))
        return rows[:, : keys.rows, : keys.columns].float().cpu().numpy(), keys

    def features(
        self, block: str, cells: np.ndarray, *, image: int = 0, region: Optional[int] = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What chosen cells hold before the block, and what it adds to them; (Q, C) each.

        Arguments are those of `weights`. The block runs again, in evaluation mode.
        """
        module, x, mask = self._input(block, image, region)
        training = module.training
        with torch.no_grad():
            # Not as a call: that would be recorded.
            added = module.eval().forward(x, mask) - x
        module.train(training)
        rows, columns = torch.as_tensor(cells[:, ::-1].copy(), device=x.device).T
        before, after = (t[0, :, rows, columns].T.float().cpu().numpy() for t in (x, added))
        return before, after

    def _input(
        self, block: str, image: int, region: Optional[int]
    ) -> tuple[NonLocalBase, Tensor, Optional[Tensor]]:
        """The block, and its input and mask for one image or region, as a batch of one."""
        call = self._call(block)
        index = image
        if call.regions is not None:
            index = region + sum(map(len, call.regions.boxes[:image]))
        mask = None if call.mask is None else call.mask[index : index + 1]
        return self._blocks[block], call.x[index : index + 1], mask

    def region(
        self, block: str, place: Any, *, image: int = 0, box: Optional[Any] = None
    ) -> Optional[int]:
        """Which of the `regions` a place belongs to; None for a block that sees the whole image.

        Arguments are those of `attention_maps`, for one place.

        Raises:
            ValueError: if it belongs to none.
        """
        regions = self.regions(block, image=image)
        if regions is None:
            return None
        if box is None:
            return _region_around(regions, _rows_of_numbers(place)[0])
        return _region_like(regions, _rows_of_numbers(box)[0])

    def _image_size_of(self, image: int) -> _ImageSize:
        if not 0 <= image < len(self._pictures):
            raise IndexError(
                f"There is no image {image}: the recorded call has {len(self._pictures)}."
            )
        return self._pictures[image]

    def _call(self, block: str) -> _Call:
        if block not in self._calls:
            reached = ", ".join(self._calls) or "none; call the model inside the context"
            raise KeyError(f"No block {block!r} was recorded. Recorded: {reached}.")
        return self._calls[block]


def _size(x: Tensor) -> tuple[int, int]:
    """(width, height) of (..., H, W)."""
    return int(x.shape[-1]), int(x.shape[-2])


def _image_size_of(entry: dict[str, Any]) -> _ImageSize:
    """From an entry of detectron2's batch: the image is resized, height and width are original."""
    width, height = resized = _size(entry["image"])
    return _ImageSize((int(entry.get("width", width)), int(entry.get("height", height))), resized)


def _rows_of_numbers(places: Any) -> np.ndarray:
    """Points or boxes, one or several, to (Q, 2) or (Q, 4)."""
    if isinstance(places, Boxes):
        places = places.tensor
    if isinstance(places, Tensor):
        places = places.detach().cpu().numpy()
    array = np.atleast_2d(np.asarray(places, dtype=np.float64))
    if array.size and (array.ndim != 2 or array.shape[1] not in (2, 4)):
        raise ValueError(
            f"Places have the shape {list(array.shape)}; they must be (Q, 2) points (x, y) or "
            f"(Q, 4) boxes (x0, y0, x1, y1)."
        )
    return array if array.size else array.reshape(0, 2)


def _region_around(regions: np.ndarray, place: np.ndarray) -> int:
    """The index of the smallest region around a point, or around a box's centre."""
    x, y = place if len(place) == 2 else (place[:2] + place[2:]) / 2
    x0, y0, x1, y1 = regions.T
    area = np.where((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1), (x1 - x0) * (y1 - y0), np.inf)
    if not np.isfinite(area).any():
        raise ValueError(f"No region of the recorded call holds the point ({x:g}, {y:g}).")
    return int(area.argmin())


def _region_like(regions: np.ndarray, box: np.ndarray) -> int:
    """The index of the region with the largest overlap with a box, as intersection over union."""
    corners = np.minimum(regions[:, 2:], box[2:]) - np.maximum(regions[:, :2], box[:2])
    shared = np.clip(corners, 0, None).prod(axis=1)
    sizes = (regions[:, 2:] - regions[:, :2]).prod(axis=1)
    overlap = shared / np.maximum(sizes + (box[2:] - box[:2]).prod() - shared, 1e-9)
    if not (overlap > 0).any():
        raise ValueError(
            f"No region of the recorded call overlaps the box {box.round(1).tolist()}."
        )
    return int(overlap.argmax())
