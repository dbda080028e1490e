"""Polygons, and their rasterization by exact signed distance.

A canvas is a float array (H, W, 3), painted in place. Coordinates are continuous (x, y) in pixels:
its top left corner is (0, 0), and the center of its first pixel is (0.5, 0.5). A polygon is an
array (V, 2) of vertices; those made here fit the unit circle. A box is a rectangle of whole pixels,
which may extend beyond the canvas.
"""

from __future__ import annotations

import math

import numpy as np


def regular(corners: int) -> np.ndarray:
    """Return a regular polygon (corners, 2) with its first corner at (1, 0)."""
    angles = 2 * math.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def star(points: int, inner: float) -> np.ndarray:
    """Return a star.

    Args:
        points: Number of points.
        inner: Radius of the inner corners, relative to that of the points.

    Returns:
        Vertices (2 points, 2).
    """
    corners = regular(2 * points)
    corners[1::2] *= inner
    return corners


def cross(arm: float) -> np.ndarray:
    """Return a plus sign (12, 2) with arms of half width ``arm``, relative to their length."""
    quarter = np.array([[arm, arm], [arm, 1.0], [-arm, 1.0]])
    turns = [quarter]
    for _ in range(3):
        turns.append(turns[-1] @ np.array([[0.0, 1.0], [-1.0, 0.0]]))
    return np.concatenate(turns)


def rounded(polygon: np.ndarray, share: float) -> np.ndarray:
    """Round corners by quadratic Bezier curves, then scale the polygon to the unit circle.

    Args:
        polygon: Vertices (V, 2).
        share: Fraction of each edge that the curve at each of its ends replaces; below 0.5.

    Returns:
        Vertices (5 V, 2).
    """
    before = polygon + share * (np.roll(polygon, 1, axis=0) - polygon)
    after = polygon + share * (np.roll(polygon, -1, axis=0) - polygon)
    t = np.linspace(0, 1, 5)[None, :, None]
    curve = (1 - t) ** 2 * before[:, None] + 2 * t * (1 - t) * polygon[:, None]
    corners = (curve + t**2 * after[:, None]).reshape(-1, 2)
    return corners / np.hypot(*corners.T).max()


def signed_distance(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Return the distance of points to a polygon's edge in pixels, negative inside it.

    Args:
        x: x coordinates of the points, in any shape.
        y: y coordinates of the points, in any shape that broadcasts with that of x.
        polygon: Vertices (V, 2) of a polygon without self-intersections, in either orientation.

    Returns:
        Distances, in the shape that x and y broadcast to.
    """
    shape = np.broadcast(x, y).shape
    nearest = np.full(shape, np.inf)
    inside = np.zeros(shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0)):
        edge_x, edge_y, from_x, from_y = x1 - x0, y1 - y0, x - x0, y - y0
        squared_length = edge_x**2 + edge_y**2
        along = from_x * (edge_x / squared_length) + from_y * (edge_y / squared_length)
        along = np.clip(along, 0, 1)
        squared = (from_x - along * edge_x) ** 2 + (from_y - along * edge_y) ** 2
        np.minimum(nearest, squared, out=nearest)
        # Even-odd rule: a ray from the point towards +x crosses this edge.
        crosses = ((y0 <= y) != (y1 <= y)) & ((edge_x * from_y > edge_y * from_x) == (edge_y > 0))
        inside ^= crosses
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance)


def coverage(distance: np.ndarray) -> np.ndarray:
    """Return the fraction of a pixel inside an edge, from its center's signed distance to it."""
    return np.clip(0.5 - distance, 0, 1)


def box_around(points: np.ndarray, margin: float) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Return the box of whole pixels around points.

    Args:
        points: Points (N, 2) as (x, y).
        margin: Minimum distance of the box's border from the points.

    Returns:
        First pixel (x, y) of the box, and the centers of its pixels, as `pixel_centers`.
    """
    left, top = np.floor(points.min(axis=0) - margin).astype(int)
    right, bottom = np.ceil(points.max(axis=0) + margin).astype(int)
    return (left, top), *pixel_centers(left, top, right, bottom)


def pixel_centers(left: int, top: int, right: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the centers of a box's pixels: x as a row and y as a column, which broadcast."""
    return np.arange(left, right)[None, :] + 0.5, np.arange(top, bottom)[:, None] + 0.5


def blend(
    canvas: np.ndarray, corner: tuple[int, int], color: tuple[int, int, int], alpha: np.ndarray
) -> None:
    """Blend a color into a box of the canvas, in place, as far as the box lies on it.

    Args:
        canvas: Canvas (H, W, 3).
        corner: First pixel (x, y) of the box on the canvas; may lie outside.
        color: RGB color.
        alpha: Opacity from 0 to 1 at each pixel of the box, (height, width).
    """
    on_canvas, on_box = overlap(canvas.shape, corner, alpha.shape)
    area = canvas[on_canvas]
    area += alpha[on_box][..., None] * (np.array(color) - area)


def overlap(
    canvas: tuple[int, ...], corner: tuple[int, int], box: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the part that a canvas and a box share, as (rows, columns) of each of the two.

    Args:
        canvas: Shape of the canvas, (H, W, ...).
        corner: First pixel (x, y) of the box on the canvas; may lie outside.
        box: Shape of the box, (height, width).
    """
    on_canvas, on_box = [], []
    for size, start, extent in zip(canvas, reversed(corner), box):
        first, last = max(start, 0), min(start + extent, size)
        on_canvas.append(slice(first, last))
        on_box.append(slice(first - start, last - start))
    return tuple(on_canvas), tuple(on_box)
