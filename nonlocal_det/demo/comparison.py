"""Compares the two models of the demo, once they are trained."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..ablation.receptive_field import cue_reach
from ..checkpoint.predictor import Predictor
from ..data.lamps.writer import read_params
from .attending import Attending, Key
from .outcome import (
    Scene,
    attention_on_cue,
    box_ap_by_distance,
    check_images,
    chosen_scenes,
    read_detections,
    read_scenes,
    scores,
    share_correct,
)
from .page import Row, View
from .side_by_side import Model
from .strips import draw_scene

WITHOUT, WITH = 0, 1  # indices of the models
EXPLORERS = "explorer"  # folder of the explorer pages, beside the page
_NUM_SCENES = 6
_MIN_COUNT = 20  # shapes that a point of the plot stands for, at least


@dataclass(frozen=True)
class ValidationImages:
    """The images on which the models are compared.

    Attributes:
        json_file: Their annotations.
        image_root: Their folder.
        class_names: Names of the classes.
        colors: RGB color of each class.
        reach: Distance from which on a lamp is outside the stock model's receptive field, pixels.
    """

    json_file: str
    image_root: str
    class_names: list[str]
    colors: list[tuple[int, int, int]]
    reach: float


@dataclass(frozen=True)
class Comparison:
    """What both models reach.

    Attributes:
        rows: A row of the table for each model.
        on_cue: Number of the shapes beyond the receptive field that the model with a block
            classifies correctly and that attend most to the lamp or its glow.
        correct: Number of the shapes beyond the receptive field that it classifies correctly.
        views: Images as both models see them.
        explorers: Explorer page of each view, HTML by file name.
    """

    rows: list[Row]
    on_cue: int
    correct: int
    views: list[View]
    explorers: dict[str, str]


def validation_images(stock: CfgNode) -> ValidationImages:
    """Generate the images, if they are not there, and find how far the stock model sees.

    Raises:
        ValueError: If the dataset for testing is not one of the demo's images.
    """
    name = stock.DATASETS.TEST[0]
    DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    json_file = PathManager.get_local_path(metadata.json_file)
    params = read_params(json_file)
    check_images(json_file, params)
    return ValidationImages(
        json_file,
        metadata.image_root,
        list(metadata.thing_classes),
        [tuple(color) for color in metadata.thing_colors],
        cue_reach(stock, params.glow_radius),
    )


def compare(images: ValidationImages, models: Sequence[Model], cfg: CfgNode) -> Comparison:
    """Compare trained models.

    Args:
        images: The validation images.
        models: The stock model and the one with a block, which have been evaluated on them.
        cfg: Config of the model with a block, with ``MODEL.WEIGHTS``.
    """
    detections = [read_detections(model.detections) for model in models]
    scenes = read_scenes(images.json_file, detections, read_params(images.json_file))
    rows = [
        _row(images, model.name, detections[index], scenes, index)
        for index, model in enumerate(models)
    ]
    attending = Attending(Predictor(cfg), images.image_root, WITH, images.class_names)
    top_keys = attending.top_keys(scenes)
    on_cue, correct = attention_on_cue(scenes, top_keys, images.reach, WITH)
    shown = chosen_scenes(scenes, _NUM_SCENES, images.reach)
    views = [_view(images, scene, attending, top_keys[scene.image_id]) for scene in shown]
    explorers = {_page_name(scene): attending.explorer(scene) for scene in shown}
    return Comparison(rows, on_cue, correct, views, explorers)


def _row(
    images: ValidationImages,
    name: str,
    detections: list[dict[str, Any]],
    scenes: Sequence[Scene],
    index: int,
) -> Row:
    """A model's row of the table, and its curve."""
    aps = scores(images.json_file, detections, images.reach)
    near, far = (
        (aps["box"][i]["AP"], aps["mask"][i]["AP"], 100 * share_correct(scenes, index, *ends))
        for i, ends in enumerate(((0, images.reach), (images.reach,)))
    )
    distances = [shape.distance for scene in scenes for shape in scene.shapes]
    longest = max(d for d in distances if not math.isnan(d))
    by_distance = box_ap_by_distance(images.json_file, detections, longest)
    counted = [r for r in by_distance if r["count"] >= _MIN_COUNT]
    curve = [((r["low"] + r["high"]) / 2, r["AP50"]) for r in counted]
    return Row(name, near, far, curve)


def _view(
    images: ValidationImages,
    scene: Scene,
    attending: Attending,
    top_keys: Sequence[Optional[Key]],
) -> View:
    """An image as both models see it."""
    image = attending.image(scene)
    attended = {"attn_map": attending.mean_map(scene), "top_keys": top_keys}
    strips = (
        draw_scene(image, scene, WITHOUT, images.colors),
        draw_scene(image, scene, WITH, images.colors, **attended),
    )
    correct = tuple(sum(s.is_correct(model) for s in scene.shapes) for model in (WITHOUT, WITH))
    address = f"{EXPLORERS}/{_page_name(scene)}"
    return View(scene.file_name, strips, correct, len(scene.shapes), address)


def _page_name(scene: Scene) -> str:
    return f"{Path(os.path.basename(scene.file_name)).stem}.html"
