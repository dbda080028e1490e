"""Per-class results of an evaluation by pycocotools or a compatible implementation."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from detectron2.utils.file_io import PathManager
from pycocotools.cocoeval import COCOeval


class PerClassResult(NamedTuple):
    """The metrics of one class in percent; NaN for a class without objects.

    Attributes:
        name: Name of the class.
        num_objects: Number of objects; crowds are not counted, nor, for keypoints, objects without
            annotated keypoints.
        ap: Mean of AP at IoU (for keypoints OKS) .50, .55, ... .95.
        ap50: AP at .50.
        ap75: AP at .75.
        ar: Recall, mean over the same IoUs, with COCO's maximum number of detections per image:
            100, for keypoints 20.
    """

    name: str
    num_objects: int
    ap: float
    ap50: float
    ap75: float
    ar: float


HEADER = ("class", "objects", "AP", "AP50", "AP75", "AR")


def per_class_results(evaluation: COCOeval) -> list[PerClassResult]:
    """Return the results of each class by ascending category id.

    Args:
        evaluation: Evaluation after ``accumulate()``.
    """
    classes = evaluation.cocoGt.loadCats(evaluation.params.catIds)
    counts = _count_objects(evaluation)
    # (IoU, recall, class) and (IoU, class), for all object areas and the most detections.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    recall = evaluation.eval["recall"][:, :, 0, -1]
    at = {iou: np.isclose(evaluation.params.iouThrs, iou) for iou in (0.5, 0.75)}
    return [
        PerClassResult(
            category["name"],
            counts[category["id"]],
            _percent(precision[:, :, k]),
            _percent(precision[at[0.5], :, k]),
            _percent(precision[at[0.75], :, k]),
            _percent(recall[:, k]),
        )
        for k, category in enumerate(classes)
    ]


def write_per_class_csv(rows: Sequence[PerClassResult], path: str) -> None:
    """Write per-class results to a CSV file with a header; percentages have three decimals."""
    with PathManager.open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for name, num_objects, *metrics in rows:
            writer.writerow([name, num_objects, *(f"{metric:.3f}" for metric in metrics)])


def _count_objects(evaluation: COCOeval) -> Counter[int]:
    truth, params = evaluation.cocoGt, evaluation.params
    annotations = truth.loadAnns(truth.getAnnIds(imgIds=params.imgIds))
    objects = [one for one in annotations if not one.get("iscrowd", 0)]
    if params.iouType == "keypoints":
        objects = [one for one in objects if one.get("num_keypoints", 0) > 0]
    return Counter(one["category_id"] for one in objects)


def _percent(values: np.ndarray) -> float:
    """Return the mean in percent; COCOeval marks undefined values by -1."""
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else float("nan")
