"""Record an inference call, then compute the attention of any point of an image.

    with AttentionRecorder(model) as recorder:
        outputs = model(inputs)
    attn_map = recorder.attention_maps("backbone.bottom_up.res4.nl4", [(320, 200)])[0]

Inside the context the input of each block is kept, by reference; nothing is computed. Attention
weights are computed on request, and only the requested rows of the attention matrix. Outside the
context nothing is attached to the model.

Coordinates are continuous (x, y) in pixels of the original images; see
``nonlocal_det.attention.recording.geometry``.
Shape symbols: Q queries; H and W height and width of the original image; R and C rows and columns
of the grid of keys; N RoIs of an image.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import torch
import torch.nn as nn

from ...layers.base import NonLocalBase
from ...utils.deprecation import renamed_arguments, renamed_method, renamed_property
from .call_hooks import CallHooks
from .geometry import Grid
from .recorded_call import RecordedCall
from .rois import as_points_or_boxes, best_overlapping_roi, smallest_roi_around

# Rows computed at a time, so that the average over a large box fits in memory.
_CHUNK = 256


class AttentionRecorder:
    """A context in which the calls of a model are recorded; each call replaces the previous one.

    A part of a model that is called otherwise than by ``model(inputs)``, for instance by
    ``model.inference(inputs)``, does not tell the sizes of the images: its blocks are recorded, but
    what needs the sizes raises a ValueError.

    Args:
        model: A detectron2 model, called with its list of dicts; a detector of torchvision, called
            with its list of images; or any network with non-local blocks, called with a tensor
            (B, 3, H, W).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, NonLocalBase) and module.dims == 2
        }
        self._hooks = CallHooks(model, self._blocks)

    def __enter__(self) -> AttentionRecorder:
        self._hooks.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.detach()

    @property
    def _call(self) -> RecordedCall:
        return self._hooks.call

    @property
    def block_names(self) -> list[str]:
        """Names of the model's non-local blocks, in the order of its modules."""
        return list(self._blocks)

    @property
    def recorded_blocks(self) -> list[str]:
        """Names of the blocks that ran in the latest call, a subset of `block_names`."""
        return [name for name in self._blocks if name in self._call.block_calls]

    @renamed_arguments(
        places="queries", image="image_index", boxes="roi_boxes", smooth="interpolate"
    )
    def attention_maps(
        self,
        block: str,
        queries: Any,
        *,
        image_index: int = 0,
        roi_boxes: Optional[Any] = None,
        interpolate: bool = True,
    ) -> np.ndarray:
        """Compute the attention maps of queries, over the original image.

        The value at the center of a cell is the attention weight of that cell: weights are per
        cell, not per pixel. Weights of padding are not on the map.

        Args:
            block: Name of a recorded block.
            queries: Points (x, y), shape (Q, 2), or boxes (x0, y0, x1, y1), shape (Q, 4), in
                pixels of the original image; the weights of the cells of a box are averaged.
            image_index: Index of the image in the batch.
            roi_boxes: Boxes of the queries' detections, shape (Q, 4), for a block in a head, which
                attends to one RoI at a time; other blocks ignore them. Default: the smallest RoI
                around each query.
            interpolate: Interpolate between the centers of cells instead of showing the cells.

        Returns:
            float32 array (Q, H, W); for a block in a head NaN outside the RoI.

        Raises:
            KeyError: If the block was not recorded; the message lists the recorded ones.
            IndexError: If the batch has no such image.
            ValueError: If a query lies outside the image, or outside every RoI, or if the model was
                not called by ``model(inputs)``.
        """
        rows = self.attention_rows(block, queries, image_index=image_index, roi_boxes=roi_boxes)
        width, height = self._call.image_size(image_index).original
        maps = [grid.to_image(weights[None], width, height, interpolate) for weights, grid in rows]
        return np.concatenate(maps) if maps else np.zeros((0, height, width), np.float32)

    @renamed_arguments(place="query", image="image_index", box="roi_box")
    def top_k(
        self,
        block: str,
        query: Any,
        k: int = 10,
        *,
        image_index: int = 0,
        roi_box: Optional[Any] = None,
    ) -> list[tuple[float, float, float]]:
        """Find the keys with the largest attention weights, by magnitude, for one query.

        The errors are those of `attention_maps`.

        Args:
            block: Name of a recorded block.
            query: Point (x, y), or box (x0, y0, x1, y1), in pixels of the original image.
            k: Maximum number of keys.
            image_index: Index of the image in the batch.
            roi_box: Box of the query's detection, for a block in a head.

        Returns:
            Tuples (x, y, weight), largest magnitude first; (x, y) is the center of the key's cell.
        """
        [(weights, grid)] = self.attention_rows(
            block, query, image_index=image_index, roi_boxes=roi_box
        )
        return grid.top_k(weights, k)

    @renamed_arguments(places="queries", image="image_index", boxes="roi_boxes")
    def attention_rows(
        self,
        block: str,
        queries: Any,
        *,
        image_index: int = 0,
        roi_boxes: Optional[Any] = None,
    ) -> list[tuple[np.ndarray, Grid]]:
        """Compute rows of the attention matrix, without interpolation.

        The arguments and errors are those of `attention_maps`.

        Returns:
            For each query the attention weights of the keys, shape (R, C), and their grid.
        """
        queries = as_points_or_boxes(queries)
        if self._call.block_call(block).rois is None and queries.shape[1] == 2:
            cells = self.grid(block, image_index=image_index).cells_at(queries)
            weights, keys = self.attention_weights(block, cells, image_index=image_index)
            return [(row, keys) for row in weights]
        boxes = [None] * len(queries) if roi_boxes is None else as_points_or_boxes(roi_boxes)
        rows = []
        for query, box in zip(queries, boxes):
            roi_index = self.roi_index(block, query, image_index=image_index, roi_box=box)
            rows.append(self._mean_row(block, query, image_index, roi_index))
        return rows

    def _mean_row(
        self, block: str, query: np.ndarray, image_index: int, roi_index: Optional[int]
    ) -> tuple[np.ndarray, Grid]:
        """The mean of the rows of the cells of a point or box, and the grid of the keys."""
        at = {"image_index": image_index, "roi_index": roi_index}
        grid = self.grid(block, **at)
        cells = grid.cells_at(query) if len(query) == 2 else grid.cells_in(query)
        total: Any = 0.0
        for start in range(0, len(cells), _CHUNK):
            weights, keys = self.attention_weights(block, cells[start : start + _CHUNK], **at)
            total = total + weights.sum(axis=0)
        return total / len(cells), keys

    @renamed_arguments(image="image_index")
    def roi_boxes(self, block: str, *, image_index: int = 0) -> Optional[np.ndarray]:
        """The RoIs that a block in a head ran on.

        Args:
            block: Name of a recorded block.
            image_index: Index of the image in the batch.

        Returns:
            Boxes (x0, y0, x1, y1) in pixels of the original image, shape (N, 4); None for a block
            that runs on the whole image.
        """
        return self._call.roi_boxes(block, image_index)

    @renamed_arguments(place="query", image="image_index", box="roi_box")
    def roi_index(
        self, block: str, query: Any, *, image_index: int = 0, roi_box: Optional[Any] = None
    ) -> Optional[int]:
        """The index in `roi_boxes` of the RoI that a query belongs to.

        The arguments are those of `top_k`.

        Returns:
            The RoI that overlaps ``roi_box`` most, or else the smallest one around the query; None
            for a block that runs on the whole image.

        Raises:
            ValueError: If the query belongs to no RoI.
        """
        rois = self.roi_boxes(block, image_index=image_index)
        if rois is None:
            return None
        if roi_box is None:
            return smallest_roi_around(rois, as_points_or_boxes(query)[0])
        return best_overlapping_roi(rois, as_points_or_boxes(roi_box)[0])

    @renamed_arguments(image="image_index", region="roi_index")
    def grid(self, block: str, *, image_index: int = 0, roi_index: Optional[int] = None) -> Grid:
        """The grid of a block's queries, over the image or over one of its RoIs.

        Args:
            block: Name of a recorded block.
            image_index: Index of the image in the batch.
            roi_index: Index in `roi_boxes`, for a block in a head.

        Raises:
            ValueError: If the block is in a head and ``roi_index`` is not given.
        """
        return self._call.grid(block, image_index, roi_index)

    @renamed_arguments(image="image_index", region="roi_index")
    def attention_weights(
        self,
        block: str,
        cells: np.ndarray,
        *,
        image_index: int = 0,
        roi_index: Optional[int] = None,
    ) -> tuple[np.ndarray, Grid]:
        """Compute the attention weights of query cells, without interpolation.

        Args:
            block: Name of a recorded block.
            cells: Integer query cells (column, row) of `grid`, shape (Q, 2).
            image_index: Index of the image in the batch.
            roi_index: Index in `roi_boxes`, for a block in a head.

        Returns:
            Attention weights (Q, R, C), and the grid of these keys, without padding.
        """
        grid = self.grid(block, image_index=image_index, roi_index=roi_index)
        module = self._blocks[block]
        x, mask = self._call.block_call(block).batch_of_one(image_index, roi_index)
        queries = torch.as_tensor(cells[:, 1] * x.shape[3] + cells[:, 0], device=x.device)
        with torch.no_grad():
            rows = module.attention_weights(x, queries, mask)[0]
        keys = grid.downsampled(getattr(module, "stride", 1))
        return rows[:, : keys.rows, : keys.columns].float().cpu().numpy(), keys

    @renamed_arguments(image="image_index", region="roi_index")
    def input_and_residual(
        self,
        block: str,
        cells: np.ndarray,
        *,
        image_index: int = 0,
        roi_index: Optional[int] = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a block again, in evaluation mode, and return its input and residual at some cells.

        The arguments are those of `attention_weights`.

        Returns:
            The block's input, and the residual that it adds to it; shape (Q, channels) each.
        """
        module = self._blocks[block]
        x, mask = self._call.block_call(block).batch_of_one(image_index, roi_index)
        training = module.training
        try:
            with torch.no_grad():
                # forward() instead of a call, which would be recorded.
                residual = module.eval().forward(x, mask) - x
        finally:
            module.train(training)
        rows, columns = torch.as_tensor(cells[:, ::-1].copy(), device=x.device).T
        return tuple(t[0, :, rows, columns].T.float().cpu().numpy() for t in (x, residual))

    blocks = renamed_property("blocks", "block_names")
    recorded = renamed_property("recorded", "recorded_blocks")
    attention = renamed_method("attention", "attention_maps")
    strongest = renamed_method("strongest", "top_k")
    rows = renamed_method("rows", "attention_rows")
    weights = renamed_method("weights", "attention_weights")
    regions = renamed_method("regions", "roi_boxes")
    region = renamed_method("region", "roi_index")
    features = renamed_method("features", "input_and_residual")
