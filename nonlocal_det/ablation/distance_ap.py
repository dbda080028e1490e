"""Box AP as a function of the distance between an object and the cue that decides its class.

COCO's evaluation by size, with the distance in place of the area: an object outside a range is
ignored, and so is a detection that matches it. A detection's distance is that of its own box, so
that a false positive counts where it lies.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def ap_by_distance(
    json_file: str, detections: list[dict[str, Any]], edges: Sequence[float]
) -> list[dict[str, float]]:
    """Compute the AP over the objects in each range of distances from their image's cue.

    Args:
        json_file: Ground truth in COCO's format whose images have ``cue_xy``, in pixels, as those
            of the lamps datasets.
        detections: Detections in COCO's results format: ``image_id``, ``category_id``, ``bbox`` (x,
            y, width, height in pixels) and ``score``.
        edges: Ends of the ranges in pixels, ascending; R + 1 of them for R ranges [low, high).

    Returns:
        For each range ``low`` and ``high``, the ``count`` of its objects, and their ``AP`` and
        ``AP50`` in percent, nan where it has none.

    Raises:
        ValueError: If the images have no ``cue_xy``.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        cues = {image["id"]: image.get("cue_xy") for image in truth.imgs.values()}
        if None in cues.values():
            raise ValueError(f"The images of {json_file!r} have no 'cue_xy', so no distance.")
        found = truth.loadRes([dict(d) for d in detections]) if detections else COCO()
        for box in (*truth.anns.values(), *found.anns.values()):
            box["area"] = _distance(box["bbox"], cues[box["image_id"]])
        evaluation = COCOeval(truth, found, "bbox")
        # COCO's ranges include both of their ends.
        ranges = [[low, math.nextafter(high, low)] for low, high in zip(edges, edges[1:])]
        evaluation.params.areaRng = ranges
        evaluation.params.areaRngLbl = [str(low) for low in edges[:-1]]
        evaluation.evaluate()
        evaluation.accumulate()
    # Axes: IoU thresholds, recalls, classes, ranges, limits of detections per image.
    precision = evaluation.eval["precision"][..., -1]
    distances = np.array([box["area"] for box in truth.anns.values()])
    return [
        {
            "low": low,
            "high": high,
            "count": int(np.sum((distances >= low) & (distances < high))),
            "AP": _mean(precision[..., i]),
            "AP50": _mean(precision[0, ..., i]),
        }
        for i, (low, high) in enumerate(zip(edges, edges[1:]))
    ]


def _distance(box: Sequence[float], cue: Sequence[float]) -> float:
    """Distance in pixels from the center of a box (x, y, width, height) to a point (x, y)."""
    x, y, width, height = box
    return math.dist((x + width / 2, y + height / 2), cue)


def _mean(precision: np.ndarray) -> float:
    """Mean precision in percent; -1 marks a class without an object."""
    known = precision[precision > -1]
    return float(known.mean() * 100) if known.size else math.nan
