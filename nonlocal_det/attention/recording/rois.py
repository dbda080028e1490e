"""Queries as points or boxes, and the RoI that each of them belongs to.

Coordinates are continuous (x, y) in pixels of one image, the original or the resized one.
Shape symbols: Q queries, R RoIs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.structures import Boxes
from torch import Tensor


def as_points_or_boxes(queries: Any) -> np.ndarray:
    """Convert points or boxes, one or several, to a float64 array (Q, 2) or (Q, 4).

    Raises:
        ValueError: If they are neither points (x, y) nor boxes (x0, y0, x1, y1).
    """
    if isinstance(queries, Boxes):
        queries = queries.tensor
    if isinstance(queries, Tensor):
        queries = queries.detach().cpu().numpy()
    array = np.atleast_2d(np.asarray(queries, dtype=np.float64))
    if array.size and (array.ndim != 2 or array.shape[1] not in (2, 4)):
        raise ValueError(
            f"The queries have the shape {list(array.shape)}; they must be (Q, 2) points (x, y) or "
            f"(Q, 4) boxes (x0, y0, x1, y1)."
        )
    return array if array.size else array.reshape(0, 2)


def smallest_roi_around(rois: np.ndarray, query: np.ndarray) -> int:
    """Find the smallest RoI that contains a point, or the center of a box.

    Args:
        rois: RoI boxes, shape (R, 4).
        query: Point, shape (2,), or box, shape (4,).

    Returns:
        Index of the RoI.

    Raises:
        ValueError: If no RoI contains the point.
    """
    x, y = query if len(query) == 2 else (query[:2] + query[2:]) / 2
    x0, y0, x1, y1 = rois.T
    area = np.where((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1), (x1 - x0) * (y1 - y0), np.inf)
    if not np.isfinite(area).any():
        raise ValueError(f"No RoI of the recorded call contains the point ({x:g}, {y:g}).")
    return int(area.argmin())


def best_overlapping_roi(rois: np.ndarray, box: np.ndarray) -> int:
    """Find the RoI with the largest intersection over union with a box.

    Args:
        rois: RoI boxes, shape (R, 4).
        box: Box, shape (4,).

    Returns:
        Index of the RoI.

    Raises:
        ValueError: If no RoI overlaps the box.
    """
    overlap = np.minimum(rois[:, 2:], box[2:]) - np.maximum(rois[:, :2], box[:2])
    intersection = np.clip(overlap, 0, None).prod(axis=1)
    areas = (rois[:, 2:] - rois[:, :2]).prod(axis=1)
    union = areas + (box[2:] - box[:2]).prod() - intersection
    iou = intersection / np.maximum(union, 1e-9)
    if not (iou > 0).any():
        raise ValueError(f"No RoI of the recorded call overlaps the box {box.round(1).tolist()}.")
    return int(iou.argmax())
