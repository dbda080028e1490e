"""Conversion between cells of a feature map and pixels of the original image.

An image is resized, padded on the right and at the bottom, and divided into cells by a network; or
one RoI of it is divided into cells by RoI pooling. Either way the cells form a regular grid.

Coordinates are continuous (x, y) in pixels of the original image: its top left corner is (0, 0),
and the center of its first pixel is (0.5, 0.5). Sizes are (width, height), unlike detectron2's
``image_size``.

Shape symbols: Q queries; H and W height and width of the original image in pixels; R and C rows and
columns of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...utils.deprecation import renamed_arguments, renamed_method


@dataclass(frozen=True)
class Grid:
    """Cells of equal size over an image, or over one RoI of it.

    Lengths are in pixels of the original image and may be fractional.

    Attributes:
        left: x of the left edge of the first column.
        top: y of the top edge of the first row.
        cell_width: Width of a cell.
        cell_height: Height of a cell.
        columns: Number of columns that show any part of the image.
        rows: Number of rows that show any part of the image.
        bounds: Box (x0, y0, x1, y1) that the cells show; the last cells may extend beyond it.
    """

    left: float
    top: float
    cell_width: float
    cell_height: float
    columns: int
    rows: int
    bounds: tuple[float, float, float, float]

    def cells_at(self, points: np.ndarray) -> np.ndarray:
        """Find the cells that contain points.

        Args:
            points: Points (x, y), shape (Q, 2).

        Returns:
            Integer cells (column, row), shape (Q, 2).

        Raises:
            ValueError: If a point lies outside `bounds`.
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
        """Find the cells whose centers lie in a box, or else the cell at the center of the box.

        Args:
            box: Box (x0, y0, x1, y1).

        Returns:
            Integer cells (column, row), shape (Q, 2).

        Raises:
            ValueError: If no cell center lies in the box and its center is outside `bounds`.
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
        """Compute the centers of the visible part of each column and of each row.

        Returns:
            The x of each column's center, shape (C,), and the y of each row's, shape (R,).
        """
        x0, y0, x1, y1 = self.bounds
        return (
            _cell_centers(self.left, self.cell_width, self.columns, x0, x1),
            _cell_centers(self.top, self.cell_height, self.rows, y0, y1),
        )

    def top_k(self, values: np.ndarray, k: int) -> list[tuple[float, float, float]]:
        """Select the values of largest magnitude.

        Args:
            values: One value for each cell, shape (R, C).
            k: Maximum number of values to select.

        Returns:
            Tuples (x, y, value), largest magnitude first; (x, y) is the center of the cell.
        """
        x, y = self.centers()
        order = np.argsort(-np.abs(values), axis=None, kind="stable")[:k]
        rows, columns = np.unravel_index(order, values.shape)
        return [(float(x[c]), float(y[r]), float(values[r, c])) for r, c in zip(rows, columns)]

    @renamed_arguments(step="factor")
    def downsampled(self, factor: int) -> Grid:
        """The grid whose cells are ``factor`` times as wide and high, with partial cells kept."""
        return replace(
            self,
            cell_width=self.cell_width * factor,
            cell_height=self.cell_height * factor,
            columns=-(-self.columns // factor),
            rows=-(-self.rows // factor),
        )

    @renamed_arguments(smooth="interpolate")
    def to_image(
        self, values: np.ndarray, width: int, height: int, interpolate: bool = True
    ) -> np.ndarray:
        """Upsample values of the cells to the pixels of the original image.

        Args:
            values: Values of the cells, shape (Q, R, C).
            width: Width W of the original image in pixels.
            height: Height H of the original image in pixels.
            interpolate: Interpolate bilinearly between the cell centers, where the values are
                exact; if false, every pixel of a cell gets the value of the cell.

        Returns:
            float32 array (Q, H, W), NaN at pixels whose centers lie outside `bounds`.
        """
        x0, y0, x1, y1 = self.bounds
        across = _resampling_weights(
            self.left, self.cell_width, self.columns, width, x0, x1, interpolate
        )
        down = _resampling_weights(
            self.top, self.cell_height, self.rows, height, y0, y1, interpolate
        )
        return down @ values.astype(np.float32) @ across.T

    strongest = renamed_method("strongest", "top_k")
    coarser = renamed_method("coarser", "downsampled")
    spread = renamed_method("spread", "to_image")


def _cell_centers(start: float, cell: float, count: int, low: float, high: float) -> np.ndarray:
    """Centers of the part of each cell that lies between ``low`` and ``high``, on one axis."""
    edges = np.clip(start + cell * np.arange(count + 1), low, high)
    return (edges[:-1] + edges[1:]) / 2


def _resampling_weights(
    start: float, cell: float, count: int, pixels: int, low: float, high: float, interpolate: bool
) -> np.ndarray:
    """Weight of each cell of one axis at the center of each pixel, shape (pixels, count)."""
    centers = np.arange(pixels) + 0.5
    # In cells, 0 being the center of the first. Beyond the outermost centers values are constant.
    position = np.clip((centers - start) / cell - 0.5, 0, count - 1)
    if not interpolate:
        position = np.floor(position + 0.5)
    distance = np.abs(position[:, None] - np.arange(count))
    weights = np.maximum(1 - distance, 0).astype(np.float32)
    weights[(centers < low) | (centers > high)] = np.nan
    return weights


def image_grid(
    feature: tuple[int, int],
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
) -> Grid:
    """Build the grid of a feature map over one image of a batch.

    Args:
        feature: (width, height) of the feature map in cells, padding included.
        padded: (width, height) of the padded batch in pixels.
        resized: (width, height) of this image after resizing, before padding, in pixels.
        original: (width, height) of this image before resizing, in pixels.
    """
    stride = _stride(feature, padded)
    cell = [stride * size / length for size, length in zip(original, resized)]
    columns, rows = (int(-(-length // stride)) for length in resized)
    return Grid(0.0, 0.0, *cell, columns, rows, (0.0, 0.0, *map(float, original)))


def _stride(feature: tuple[int, int], padded: tuple[int, int]) -> float:
    """The stride of a feature map: a power of two if one fits, for networks halve and round up."""
    for stride in (2**power for power in range(10)):
        if all(-(-length // stride) == cells for length, cells in zip(padded, feature)):
            return stride
    return padded[0] / feature[0]


def roi_grid(
    feature: tuple[int, int], pooled: tuple[int, int], box: tuple[float, float, float, float]
) -> Grid:
    """Build the grid of a head's feature map over one RoI.

    Args:
        feature: (width, height) of the feature map in cells.
        pooled: (width, height) of the RoI pooling output in cells, before any stride of the head.
        box: RoI box (x0, y0, x1, y1) in pixels of the original image.
    """
    stride = _stride(feature, pooled)
    x0, y0, x1, y1 = map(float, box)
    cell = [stride * length / count for length, count in zip((x1 - x0, y1 - y0), pooled)]
    return Grid(x0, y0, *cell, *feature, (x0, y0, x1, y1))
