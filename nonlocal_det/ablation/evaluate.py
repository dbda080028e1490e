"""Evaluation of a finished run: its APs, and when it learned."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from typing import Any, Optional

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from .distance_ap import ap_by_distance, class_agnostic_ap
from .results import LEARNED


def evaluate_run(
    folder: str, datasets: Sequence[str], distances: Sequence[float] = (), reach: float = 0
) -> dict[str, Any]:
    """Evaluate a finished run from what its training left.

    Args:
        folder: Output folder of the run.
        datasets: Names of the datasets that it was evaluated on. The first counts, if there is one
            in COCO's format, for what follows after the APs of the end.
        distances: Ends of ranges of distances to the cue in pixels, ascending, or none.
        reach: Distance from which on a cue is outside the baseline's receptive field.

    Returns:
        ``metrics``: AP, AP50 and AP75 of each task at the end, by their names in metrics.json, and
        the AP of boxes whatever their class. ``learned_at``: the first recorded iteration at which
        `LEARNED` of the sampled objects were classified rightly, or None. ``accuracy``: that share
        at the end. ``entropy``: the mean relative entropy of the attention of all blocks, by
        iteration. With distances, ``by_distance`` and ``beyond_reach``: AP in each range, and from
        ``reach`` to the last end.
    """
    with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    last = records[-1]
    metrics = {key: last[key] for key in last if key.endswith(("/AP", "/AP50", "/AP75"))}
    result = {"metrics": metrics, **_learning(records)}
    json_file = MetadataCatalog.get(datasets[0]).get("json_file") if datasets else None
    if json_file is None:
        return result
    truth = PathManager.get_local_path(json_file)
    found = os.path.join(folder, "inference", "coco_instances_results.json")
    with open(found, encoding="utf-8") as file:
        detections = json.load(file)
    metrics["bbox/AP-any-class"] = class_agnostic_ap(truth, detections)
    if distances:
        result["by_distance"] = ap_by_distance(truth, detections, distances)
        (result["beyond_reach"],) = ap_by_distance(truth, detections, (reach, distances[-1]))
    return result


def _learning(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """When a run learned, how well in the end, and how its attention went."""
    accuracies = {
        r["iteration"] + 1: r["fast_rcnn/fg_cls_accuracy"]
        for r in records
        if "fast_rcnn/fg_cls_accuracy" in r
    }
    learned_at: Optional[int] = next((i for i, a in accuracies.items() if a >= LEARNED), None)
    entropies = {}
    for record in records:
        values = [v for key, v in record.items() if key.endswith("/entropy")]
        if values:
            entropies[str(record["iteration"] + 1)] = round(statistics.fmean(values), 4)
    last = list(accuracies.values())[-3:]
    return {
        "learned_at": learned_at,
        "accuracy": round(statistics.fmean(last), 4) if last else None,
        "entropy": entropies,
    }
