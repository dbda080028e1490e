"""Queries of attention: points of an image, and the detections that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from detectron2.structures import Instances

from .geometry import Grid
from .recorder import AttentionRecorder


@dataclass(frozen=True)
class AttentionQuery:
    """A query point of an image, and the detection that it represents, if any.

    Attributes:
        point: Query point (x, y) in pixels of the original image.
        label: Title of the panel.
        box: Box (x0, y0, x1, y1) of the detection in pixels of the original image, or None.
    """

    point: tuple[float, float]
    label: str = ""
    box: Optional[tuple[float, float, float, float]] = None


def queries_from_instances(
    instances: Instances, names: Optional[Sequence[str]] = None
) -> list[AttentionQuery]:
    """Create queries at the centers of detections.

    Args:
        instances: Detections of one image.
        names: Class names. Default, and for a class without a name: "class 0", "class 1", ...

    Returns:
        One query for each detection, labeled with number, class and score: "1 person 98%".
    """
    boxes = instances.pred_boxes.tensor.cpu().numpy().astype(float)
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    queries = []
    for number, (box, class_id, score) in enumerate(zip(boxes, classes, scores), start=1):
        name = names[class_id] if names and class_id < len(names) else f"class {class_id}"
        center = (float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2)
        queries.append(AttentionQuery(center, f"{number} {name} {score:.0%}", tuple(box.tolist())))
    return queries


def query_rows(
    recorder: AttentionRecorder,
    block: str,
    queries: Sequence[AttentionQuery],
    image_index: int = 0,
) -> list[tuple[np.ndarray, Grid]]:
    """Compute `AttentionRecorder.attention_rows` for queries with or without boxes.

    Args:
        recorder: Recorder that holds the call.
        block: Name of a recorded block.
        queries: Queries; their boxes select the RoI of a block in a head if all have one.
        image_index: Index of the image in the batch.

    Returns:
        For each query the attention weights of the keys, shape (R, C), and their grid.
    """
    points = [query.point for query in queries]
    boxed = queries and all(query.box is not None for query in queries)
    boxes = [query.box for query in queries] if boxed else None
    return recorder.attention_rows(block, points, image_index=image_index, roi_boxes=boxes)
