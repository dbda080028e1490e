"""Influence of regions of an image on detections, through a block.

Attention says where a block takes features from; influence says what becomes of a detection
without them: the positions of a region are taken out of what the block can attend to, everything
else runs as before, and the detection is scored again at its own box.

    influence = Influence(model, inputs, outputs[0]["instances"], block="backbone.res4.nl0")
    change = influence.of_regions([(300, 20, 360, 80)])
    change.probability      # of each detection's class, by region and detection

Coordinates are continuous (x, y) in pixels of the original images; see
``nonlocal_det.attention.recording.geometry``.
Shape symbols: N detections; R regions; H and W height and width of the original image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from detectron2.structures import Boxes, Instances, pairwise_iou

from ...layers.base import NonLocalBase
from ..recording.geometry import Grid, image_grid, roi_grid
from ..recording.recorded_call import ImageSize, size_of
from .fixed_boxes import FixedBoxes, Scores
from .regions import Cells, Region, cells_of_grid, cells_of_region
from .replay import Replay

_MANY = 16  # regions, for which it pays to find out what need not run


@dataclass(frozen=True)
class Change:
    """What becomes of detections; positive where they lose. Float arrays, one value for each.

    Attributes:
        probability: Probability of the detection's class, before minus after.
        logit: Logit of the class, before minus after.
        box: 1 - IoU of the predicted boxes before and after.
        mask: Mean magnitude of the change of the mask's probabilities; nan without masks.
    """

    probability: np.ndarray
    logit: np.ndarray
    box: np.ndarray
    mask: np.ndarray

    @classmethod
    def stack(cls, changes: Sequence[Change], shape: tuple[int, ...]) -> Change:
        """Changes of several regions in arrays of ``shape``."""
        return cls(
            *(
                np.stack([getattr(change, field.name) for change in changes]).reshape(shape)
                if changes
                else np.zeros(shape)
                for field in fields(cls)
            )
        )


class Influence:
    """Computes influence on the detections of one image.

    The model runs once, up to what comes after the block; each region then costs what is after it.

    Args:
        model: A detectron2 detector with RoI heads, in evaluation mode.
        inputs: Its inputs, list of dicts, as in ``model(inputs)``.
        instances: Detections of the image, as in ``model(inputs)[image_index]["instances"]``; their
            classes and boxes count.
        block: Name of the block, as in `AttentionRecorder.block_names`.
        image_index: Index of the image in the batch.

    Attributes:
        scores: Scores of the detections, at their own boxes, with the block as it is.

    Raises:
        KeyError: If the model has no such block; the message lists them.
        TypeError: If the model has no RoI heads.
        ValueError: If it is in training mode, or there is no such image.
        RuntimeError: If the block does not run on these detections.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[dict[str, Any]],
        instances: Instances,
        *,
        block: str,
        image_index: int = 0,
    ) -> None:
        self._block = _block_of(model, block)
        if model.training:
            raise ValueError("The model is in training mode; influence is of a trained model.")
        if not 0 <= image_index < len(inputs):
            raise ValueError(f"There is no image {image_index}: there are {len(inputs)}.")
        self._size = ImageSize.from_input(inputs[image_index])
        self._boxes = instances.pred_boxes.tensor.detach().float().cpu().numpy()
        heads = FixedBoxes(model, inputs, image_index)
        to_resized = np.tile(np.divide(self._size.resized, self._size.original), 2)
        boxes = Boxes(torch.as_tensor(self._boxes * to_resized, dtype=torch.float32))
        self._padded, self._heads = size_of(heads.batch), heads
        classes = instances.pred_classes.to(heads.batch.device)
        score = heads.scorer(boxes.to(heads.batch.device), classes)
        self._replay: Replay[Scores] = Replay(model, self._block, score, Scores.tensors)
        self.scores = self._replay.result

    def of_regions(self, regions: Iterable[Region]) -> Change:
        """Influence of each region on each detection, arrays (R, N).

        Args:
            regions: Points (x, y), which stand for the cell that contains them; boxes (x0, y0, x1,
                y1), for the cells whose centers they contain, at least one; boolean masks (H, W),
                for the cells whose centers they contain; or functions from a grid of a block's
                positions to its cells, boolean (rows, columns).

        Raises:
            ValueError: If a region lies outside the image, or is none of these.
        """
        size = self._size.original
        return self._of_hidden([cells_of_region(region, size) for region in regions])

    def of_block(self) -> Change:
        """Influence of the whole block: the change without it, arrays (N,)."""
        return self._change(self._replay.run(lambda x, mask=None: x))

    def map(self, rows: int, columns: int) -> Change:
        """Influence of each cell of a grid over the image, arrays (N, rows, columns).

        A cell of the grid stands for the block's positions whose centers it contains; one that
        contains none has no influence.

        Args:
            rows: Number of rows.
            columns: Number of columns.
        """
        count = rows * columns
        each = self.of_cells(np.eye(count, dtype=bool).reshape(count, rows, columns))
        shape = (len(self._boxes), rows, columns)
        return Change(*(getattr(each, f.name).T.reshape(shape) for f in fields(Change)))

    def of_cells(self, cells: np.ndarray) -> Change:
        """Influence of sets of cells of a grid over the image, arrays (R, N).

        Args:
            cells: Boolean (R, rows, columns), True at the cells of each set.
        """
        size = self._size.original
        return self._of_hidden(
            [partial(cells_of_grid, cells=of_set, size=size) for of_set in cells]
        )

    def _of_hidden(self, hidden: Sequence[Cells]) -> Change:
        """The changes without the keys at each of the hidden cells, arrays (R, N)."""
        if len(hidden) > _MANY:
            self._replay.skip_unused()
        changes = [self._without_keys(hidden_in) for hidden_in in hidden]
        return Change.stack(changes, (len(changes), len(self._boxes)))

    def _without_keys(self, hidden_in: Cells) -> Change:
        """The change without the keys at hidden cells, boolean (rows, columns) of a grid."""
        x = self._replay.x
        keys = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool, device=x.device)
        for index, grid in enumerate(self._grids()):
            hidden = torch.as_tensor(hidden_in(grid), device=x.device)
            keys[index, : grid.rows, : grid.columns] &= ~hidden
        if bool(keys.all()):  # a region between the cells: nothing changes, to the bit
            return self._change(self.scores)
        block = self._block
        return self._change(
            self._replay.run(lambda x, mask=None: block.forward_with_keys(x, keys, mask))
        )

    def _grids(self) -> list[Grid]:
        """The grid of the block's positions: one over the image, or one over each RoI."""
        feature = size_of(self._replay.x)
        pooled = self._heads.pooled_size(self._block)
        if pooled is None:
            return [image_grid(feature, self._padded, self._size.resized, self._size.original)]
        return [roi_grid(feature, pooled, box) for box in self._boxes]

    def _change(self, after: Scores) -> Change:
        before = self.scores
        box = 1 - torch.diagonal(pairwise_iou(Boxes(before.boxes), Boxes(after.boxes)))
        mask = torch.full_like(box, torch.nan)
        if before.masks is not None and after.masks is not None:
            mask = (before.masks - after.masks).abs().flatten(1).mean(dim=1)
        probability = before.probabilities - after.probabilities
        parts = (probability, before.logits - after.logits, box, mask)
        return Change(*(part.double().cpu().numpy() for part in parts))


def _block_of(model: nn.Module, name: str) -> NonLocalBase:
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, NonLocalBase)}
    if name not in blocks:
        there = f"there are {', '.join(blocks)}" if blocks else "the model has none"
        raise KeyError(f"No non-local block has the name {name!r}; {there}.")
    return blocks[name]
