"""From cells of a feature map to pixels of the original image, and back.

An image is resized, then padded to the right and bottom, then divided into cells by a network; or
one region of it is divided into cells by RoI pooling. Either way the cells form a regular grid.

Coordinates are continuous (x, y) in pixels of the original image: its top left corner is (0, 0),
and the centre of its first pixel is (0.5, 0.5). Shapes: Q queries, H and W the image's height and
width in pixels, R and C the rows and columns of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Cells of equal size over an image, or over one region of it.

    Attributes:
        left: x of the first cell's left edge.
        top: y of the first cell's top edge.
        cell_width: in pixels of the original image, as all lengths here; rarely whole.
        cell_height: likewise.
        columns: number of cells that hold anything of the image, in a row.
        rows: likewise, in a column.
        bounds: (x0, y0, x1, y1) of what the cells show; the last ones may reach beyond.
    """

    left: float
    top: float
    cell_width: float
    cell_height: float
    columns: int
    rows: int
    bounds: tuple[float, float, float, float]

    def cells_at(self, points: np.ndarray) -> np.ndarray:
        """(Q, 2) points as (x, y) to the cells they lie in, (Q, 2) as (column, row).

        Raises:
            ValueError: if a point lies outside ``bounds``.
        """
        points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        x0, y0, x1, y1 = self.bounds
        outside = ~((points >= (x0, y0)) & (points <= (x1, y1))).all(axis=1)
        if outside.any():
            x, y = points[outside][0]
            raise ValueError(
                f"The point ({x:g}, {y:g}) lies outside: x goes from {x0:g} to {x1:g} and y from "
                f"{y0:g} to {y1:g}."
            )
        cells = (points - (self.left, self.top)) / (self.cell_width, self.cell_height)
        # The image's right and bottom edges belong to its last cells.
        return np.minimum(np.floor(cells).astype(np.int64), (self.columns - 1, self.rows - 1))

    def cells_in(self, box: np.ndarray) -> np.ndarray:
        """The cells whose centres lie in a box (x0, y0, x1, y1), (Q, 2) as (column, row).

        A box without any takes the cell at its centre.

        Raises:
            ValueError: if that centre lies outside ``bounds``.
        """
        x0, y0, x1, y1 = box
        columns, rows = self.centers()
        inside = [
            np.flatnonzero((centers >= low) & (centers <= high))
            for centers, low, high in ((columns, x0, x1), (rows, y0, y1))
        ]
        if not (inside[0].size and inside[1].size):
            return self.cells_at(np.array([[(x0 + x1) / 2, (y0 + y1) / 2]]))
        return np.stack(np.meshgrid(*inside), axis=-1).reshape(-1, 2)

    def centers(self) -> tuple[np.ndarray, np.ndarray]:
        """The x of each column's centre, (C,), and the y of each row's, (R,), within ``bounds``."""
        x0, y0, x1, y1 = self.bounds
        return (
            _middles(self.left, self.cell_width, self.columns, x0, x1),
            _middles(self.top, self.cell_height, self.rows, y0, y1),
        )

    def strongest(self, values: np.ndarray, k: int) -> list[tuple[float, float, float]]:
        """The ``k`` largest of values (R, C) by magnitude, with their cells' centres, in order.

        Returns:
            (x, y, value) of each.
        """
        x, y = self.centers()
        order = np.argsort(-np.abs(values), axis=None, kind="stable")[:k]
        rows, columns = np.unravel_index(order, values.shape)
        return [(float(x[c]), float(y[r]), float(values[r, c])) for r, c in zip(rows, columns)]

    def coarser(self, step: int) -> Grid:
        """The grid of cells ``step`` times as wide and high, borders rounded up."""
        return replace(
            self,
            cell_width=self.cell_width * step,
            cell_height=self.cell_height * step,
            columns=-(-self.columns // step),
            rows=-(-self.rows // step),
        )

    def spread(
        self, values: np.ndarray, width: int, height: int, smooth: bool = True
    ) -> np.ndarray:
        """Values of the cells to values of the image's pixels.

        Args:
            values: (Q, R, C).
            width: W.
            height: H.
            smooth: interpolate linearly between the cells' centres, where the values are kept; or
                give all pixels of a cell its value.

        Returns:
            (Q, H, W) float32, NaN at pixels outside ``bounds``.
        """
        x0, y0, x1, y1 = self.bounds
        across = _interpolation(self.left, self.cell_width, self.columns, width, x0, x1, smooth)
        down = _interpolation(self.top, self.cell_height, self.rows, height, y0, y1, smooth)
        return down @ values.astype(np.float32) @ across.T


def _middles(start: float, cell: float, count: int, low: float, high: float) -> np.ndarray:
    edges = np.clip(start + cell * np.arange(count + 1), low, high)
    return (edges[:-1] + edges[1:]) / 2


def _interpolation(
    start: float, cell: float, count: int, pixels: int, low: float, high: float, smooth: bool
) -> np.ndarray:
    """(pixels, count): how much each cell of one axis counts at the centre of each pixel."""
    centers = np.arange(pixels) + 0.5
    # In cells; 0 is the centre of the first. Beyond the outermost centres their values continue.
    place = np.clip((centers - start) / cell - 0.5, 0, count - 1)
    if not smooth:
        place = np.floor(place + 0.5)
    distance = np.abs(place[:, None] - np.arange(count))
    weights = np.maximum(1 - distance, 0).astype(np.float32)
    weights[(centers < low) | (centers > high)] = np.nan
    return weights


def image_grid(
    feature: tuple[int, int],
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
) -> Grid:
    """The grid of a feature map over one image of a batch.

    Args:
        feature: (width, height) of the feature map in cells, padding included, as all pairs here.
        padded: of the batch, in pixels of the resized image.
        resized: of this image before padding.
        original: of this image before resizing.
    """
    stride = _stride(feature, padded)
    cell = [stride * size / length for size, length in zip(original, resized)]
    columns, rows = (int(-(-length // stride)) for length in resized)
    return Grid(0.0, 0.0, *cell, columns, rows, (0.0, 0.0, *map(float, original)))


def _stride(feature: tuple[int, int], padded: tuple[int, int]) -> float:
    """The step of the cells: the power of two that fits, for networks round up what they halve."""
    for stride in (2**power for power in range(10)):
        if all(-(-length // stride) == cells for length, cells in zip(padded, feature)):
            return stride
    return padded[0] / feature[0]


def roi_grid(
    feature: tuple[int, int], pooled: tuple[int, int], box: tuple[float, float, float, float]
) -> Grid:
    """The grid of a feature map over one region.

    Args:
        feature: (width, height) of the feature map in cells.
        pooled: of what RoI pooling gave, before any stride of the head.
        box: the region, (x0, y0, x1, y1) in the original image.
    """
    stride = _stride(feature, pooled)
    x0, y0, x1, y1 = map(float, box)
    cell = [stride * length / count for length, count in zip((x1 - x0, y1 - y0), pooled)]
    return Grid(x0, y0, *cell, *feature, (x0, y0, x1, y1))
