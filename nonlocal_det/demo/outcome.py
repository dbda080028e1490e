"""What the models of the demo detect, and what the block attends to, in the validation images."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
from pycocotools import mask as mask_util

from ..ablation.distance_ap import ap_by_distance
from ..data.lamps.params import LampsParams

MIN_IOU = 0.5
IOU_TYPES = {"box": "bbox", "mask": "segm"}
_STEP = 64  # pixels, of the distances of the plot

Detection = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """An annotated object whose class the cue decides, and the detections of it.

    Attributes:
        box: Box (x, y, width, height) in pixels, as in COCO's format.
        category: Its class, from 0.
        distance: Distance of its center from the cue in pixels; nan where there is no cue.
        detections: The most confident detection of the object by each model, or None.
    """

    box: tuple[float, float, float, float]
    category: int
    distance: float
    detections: tuple[Optional[Detection], ...]

    def is_correct(self, model: int) -> bool:
        """Whether a model detects the object, and as what it is."""
        found = self.detections[model]
        return found is not None and found["category_id"] == self.category + 1


@dataclass(frozen=True)
class Scene:
    """A validation image.

    Attributes:
        image_id: Its id.
        file_name: Its file, relative to the dataset's images.
        category: The class of its shapes, from 0.
        cue: Center (x, y) of the cue in pixels, or None.
        cue_radius: Radius of the cue, its glow included, in pixels.
        shapes: Its shapes.
    """

    image_id: int
    file_name: str
    category: int
    cue: Optional[tuple[float, float]]
    cue_radius: float
    shapes: tuple[Shape, ...] = field(default=())


def read_detections(path: str) -> list[dict[str, Any]]:
    """Read detections in COCO's results format."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def check_images(json_file: str, params: LampsParams) -> None:
    """Check that a dataset has images as those of the demo.

    Raises:
        ValueError: If it has not.
    """
    if params.decided_by != "lamp or unlit" or not params.lamp_counts:
        raise ValueError(
            f"{json_file!r} is of other images than the demo's, which are those of unlit_long."
        )


def read_scenes(
    json_file: str, detections: Sequence[Sequence[Detection]], params: LampsParams
) -> list[Scene]:
    """Read the validation images with the detections of each model.

    Args:
        json_file: Annotations of images as those of unlit_long.
        detections: Detections of each model, in COCO's results format.
        params: Parameters of the dataset.
    """
    with open(json_file, encoding="utf-8") as file:
        truth = json.load(file)
    annotations = _by_image(truth["annotations"])
    found = [_by_image(of_model) for of_model in detections]
    return [
        _scene(image, annotations[image["id"]], [f.get(image["id"], []) for f in found], params)
        for image in truth["images"]
    ]


def _scene(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    found: Sequence[Sequence[Detection]],
    params: LampsParams,
) -> Scene:
    """An image with its annotations and with the detections of each model."""
    (cue,) = image["cues"] or [None]
    lamps = [a for a in annotations if _is_lamp(a)]
    shapes = [
        Shape(
            tuple(a["bbox"]),
            a["category_id"] - 1,
            math.nan if cue is None else a["cue_distance"],
            tuple(_detection_of(a, of_model) for of_model in found),
        )
        for a in annotations
        if not _is_lamp(a)
    ]
    return Scene(
        image["id"],
        image["file_name"],
        shapes[0].category,
        cue and tuple(cue),
        max((lamp["bbox"][2] / 2 * params.halo for lamp in lamps), default=0.0),
        tuple(shapes),
    )


def _is_lamp(annotation: Mapping[str, Any]) -> bool:
    """Whether an object is a lamp, which is its own cue."""
    return annotation["cue_distance"] is not None and annotation["cue_distance"] < 1


def _by_image(entries: Iterable[Detection]) -> dict[int, list[Detection]]:
    grouped: dict[int, list[Detection]] = {}
    for entry in entries:
        grouped.setdefault(entry["image_id"], []).append(entry)
    return grouped


def _detection_of(annotation: Detection, found: Sequence[Detection]) -> Optional[Detection]:
    """The most confident of the detections that overlap an object by `MIN_IOU`."""
    if not found:
        return None
    ious = mask_util.iou([d["bbox"] for d in found], [annotation["bbox"]], [0])[:, 0]
    overlapping = [d for d, iou in zip(found, ious) if iou >= MIN_IOU]
    return max(overlapping, key=lambda d: d["score"], default=None)


def scores(
    json_file: str, detections: list[dict[str, Any]], reach: float
) -> dict[str, list[dict[str, float]]]:
    """Box and mask AP of a model, for objects near the cue and for those beyond ``reach``.

    Args:
        json_file: Annotations of the validation images.
        detections: Detections in COCO's results format.
        reach: Distance from which on the cue is outside the stock model's receptive field, pixels.

    Returns:
        By "box" and "mask", `ap_by_distance` of both ranges.
    """
    edges = (1.0, reach, math.inf)
    return {
        name: ap_by_distance(json_file, detections, edges, iou_type=iou_type)
        for name, iou_type in IOU_TYPES.items()
    }


def box_ap_by_distance(
    json_file: str, detections: list[dict[str, Any]], longest: float
) -> list[dict[str, float]]:
    """Box AP in ranges of equal width up to the distance ``longest``, in pixels."""
    edges = [1.0, *np.arange(_STEP, longest + _STEP, _STEP)]
    return ap_by_distance(json_file, detections, edges)


def share_correct(scenes: Iterable[Scene], model: int, low: float, high: float = math.inf) -> float:
    """Share of the shapes at distances in [low, high) from the cue that a model gets right."""
    shapes = [s for scene in scenes for s in scene.shapes if low <= s.distance < high]
    correct = [shape.is_correct(model) for shape in shapes]
    return sum(correct) / len(correct) if correct else math.nan


def chosen_scenes(scenes: Sequence[Scene], count: int, beyond: float) -> list[Scene]:
    """The first images of each class that have a shape beyond a distance, the classes in turn."""
    by_class: dict[int, list[Scene]] = {}
    for scene in scenes:
        if any(shape.distance >= beyond for shape in scene.shapes):
            by_class.setdefault(scene.category, []).append(scene)
    in_turn = itertools.zip_longest(*(by_class[category] for category in sorted(by_class)))
    return [scene for turn in in_turn for scene in turn if scene][:count]


def attention_on_cue(
    scenes: Iterable[Scene],
    top_keys: Mapping[int, Sequence[Optional[tuple[float, float, float]]]],
    beyond: float,
    model: int,
) -> tuple[int, int]:
    """Of the objects beyond a distance and classified correctly, those that attend to the cue most.

    Args:
        scenes: The images.
        top_keys: By image id, the key (x, y, weight) of the largest weight for each shape, or None.
        beyond: Distance from the cue, pixels.
        model: Index of the model that has the block.

    Returns:
        How many have their largest weight on the cue or its glow, and how many there are.
    """
    hits = list(_hits(scenes, top_keys, beyond, model))
    return sum(hits), len(hits)


def _hits(
    scenes: Iterable[Scene],
    top_keys: Mapping[int, Sequence[Optional[tuple[float, float, float]]]],
    beyond: float,
    model: int,
) -> Iterator[bool]:
    for scene in scenes:
        for shape, key in zip(scene.shapes, top_keys[scene.image_id]):
            if key is not None and shape.distance >= beyond and shape.is_correct(model):
                yield math.dist(key[:2], scene.cue) <= scene.cue_radius
