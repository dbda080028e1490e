"""Regions of an image as cells of the grid of a block's positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Union

import numpy as np

from ..recording.geometry import Grid

# From a grid to its cells in a region, boolean (rows, columns).
Cells = Callable[[Grid], np.ndarray]
# A point (x, y), a box (x0, y0, x1, y1), a boolean mask (H, W), or the cells of any grid.
Region = Union[Sequence[float], np.ndarray, Cells]


def cells_of_region(region: Region, size: tuple[int, int]) -> Cells:
    """Return a function from a grid to its cells in a region of an image.

    Args:
        region: Region; see `Influence.of_regions`.
        size: (width, height) of the image in pixels.

    Raises:
        ValueError: If the region lies outside the image, or is none.
    """
    if callable(region):
        return region
    array = np.asarray(region)
    width, height = size
    if array.dtype == bool and array.shape == (height, width):
        return lambda grid: cells_in_mask(grid, array)
    if array.dtype == bool or array.shape not in ((2,), (4,)):
        raise ValueError(
            f"A region has the shape {list(array.shape)} of {array.dtype}; it must be a point "
            f"(x, y), a box (x0, y0, x1, y1) or a boolean mask [{height}, {width}]."
        )
    array = array.astype(np.float64)
    low, high = np.minimum(array[:2], array[-2:]), np.maximum(array[:2], array[-2:])
    if not ((high >= 0).all() and (low <= (width, height)).all()):
        raise ValueError(
            f"The region {array.tolist()} lies outside the image, which is {width} pixels wide "
            f"and {height} high."
        )
    return lambda grid: cells_in_box(grid, low, high)


def cells_in_box(grid: Grid, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Cells, boolean (rows, columns), whose centers lie in a box, or the one that contains it."""
    hidden = np.zeros((grid.rows, grid.columns), dtype=bool)
    x0, y0, x1, y1 = grid.bounds
    if (high >= (x0, y0)).all() and (low <= (x1, y1)).all():
        inside = np.concatenate([np.maximum(low, (x0, y0)), np.minimum(high, (x1, y1))])
        cells = grid.cells_in(inside)
        hidden[cells[:, 1], cells[:, 0]] = True
    return hidden


def cells_in_mask(grid: Grid, mask: np.ndarray) -> np.ndarray:
    """Cells, boolean (rows, columns), whose centers lie in a mask (H, W)."""
    columns, rows = grid.centers()
    x = np.clip(columns.astype(np.int64), 0, mask.shape[1] - 1)
    y = np.clip(rows.astype(np.int64), 0, mask.shape[0] - 1)
    return mask[np.ix_(y, x)]


def cells_of_grid(grid: Grid, cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cells, boolean (rows, columns), whose centers lie in cells of another grid."""
    row, column = cell_indices(grid, cells.shape, size)
    return cells[row, column]


def cell_indices(grid: Grid, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Row and column, of a grid of (rows, columns) over an image, that each cell's center is in.

    Args:
        grid: Cells of a block, R rows and C columns.
        shape: (rows, columns) of the grid over the image.
        size: (width, height) of the image in pixels.

    Returns:
        Integer array (2, R, C).
    """
    (rows, columns), (width, height) = shape, size
    x, y = grid.centers()
    column = np.minimum((x * columns / width).astype(np.int64), columns - 1)
    row = np.minimum((y * rows / height).astype(np.int64), rows - 1)
    return np.stack(np.broadcast_arrays(row[:, None], column[None, :]))
