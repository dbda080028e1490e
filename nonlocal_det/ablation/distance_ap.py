"""AP by the distance of an object from the cue that decides its class, and whatever the class.

By distance, this is COCO's evaluation by size, with the distance in place of the area: an object
outside a range is ignored, and so is a detection that matches it. A detection's distance is that of
its own box, so that a false positive counts where it lies. With several cues in an image, it is the
distance to the cue of the object that the detection overlaps most, of whichever class, or else to
the nearest cue.

What has no cue is in no range: an object that no cue decides, a detection that overlaps it most,
and everything in an image without cues.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def ap_by_distance(
    json_file: str,
    detections: list[dict[str, Any]],
    edges: Sequence[float],
    *,
    iou_type: str = "bbox",
) -> list[dict[str, float]]:
    """Compute the AP over the objects in each range of distances from their cue.

    Args:
        json_file: Ground truth in COCO's format, as that of the lamps datasets: each image has
            ``cue_xy`` in pixels, or a list of ``cues``; then each annotation has ``cue_xy``, one of
            them or null.
        detections: Detections in COCO's results format: ``image_id``, ``category_id``, ``bbox`` (x,
            y, width, height in pixels) and ``score``; for masks also ``segmentation``.
        edges: Ends of the ranges in pixels, ascending; R + 1 of them for R ranges [low, high).
        iou_type: What is compared, as in pycocotools: "bbox" or "segm".

    Returns:
        For each range ``low`` and ``high``, the ``count`` of its objects, and their ``AP`` and
        ``AP50`` in percent, nan where it has none.

    Raises:
        ValueError: If an image has neither ``cue_xy`` nor ``cues``.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = _load(json_file, detections)
        if any(image.get("cues", image.get("cue_xy")) is None for image in truth.imgs.values()):
            raise ValueError(f"The images of {json_file!r} have no 'cue_xy', so no distance.")
        for image in truth.imgs.values():
            _set_distances(image, truth.imgToAnns[image["id"]], found.imgToAnns[image["id"]])
        evaluation = COCOeval(truth, found, iou_type)
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


def class_agnostic_ap(json_file: str, detections: list[dict[str, Any]]) -> float:
    """Compute COCO's AP of boxes whatever their class, in percent.

    What it has above the AP is lost to wrong classes alone.

    Args:
        json_file: Ground truth in COCO's format.
        detections: Detections in COCO's results format.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*_load(json_file, detections), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return _mean(evaluation.eval["precision"][..., -1])


def _load(json_file: str, detections: list[dict[str, Any]]) -> tuple[COCO, COCO]:
    truth = COCO(json_file)
    return truth, truth.loadRes([dict(d) for d in detections]) if detections else COCO()


def _set_distances(
    image: dict[str, Any], objects: list[dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    """Set the area of an image's objects and detections to the distance from their cues."""
    several = "cues" in image
    cues = image["cues"] if several else [image["cue_xy"]]
    for box in objects:
        own = [box.get("cue_xy")] if several else cues
        box["cues"] = [cue for cue in own if cue is not None]
    for box in found:
        overlapped = _most_overlapped(box, objects)
        box["cues"] = overlapped["cues"] if overlapped else cues
    for box in (*objects, *found):
        box["area"] = _distance(box["bbox"], box["cues"])


def _most_overlapped(
    box: dict[str, Any], objects: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """The object of the largest IoU with a detection; None if none overlaps it."""
    if not objects:
        return None
    ious = mask_util.iou([box["bbox"]], [b["bbox"] for b in objects], [0] * len(objects))[0]
    most = int(np.argmax(ious))
    return objects[most] if ious[most] > 0 else None


def _distance(box: Sequence[float], cues: Sequence[Sequence[float]]) -> float:
    """Distance from the center of a box (x, y, width, height) to the nearest of points (x, y).

    It is in pixels; infinite if there is no point.
    """
    x, y, width, height = box
    center = (x + width / 2, y + height / 2)
    return min((math.dist(center, cue) for cue in cues), default=math.inf)


def _mean(precision: np.ndarray) -> float:
    """Mean precision in percent; -1 marks a class without an object."""
    known = precision[precision > -1]
    return float(known.mean() * 100) if known.size else math.nan
