"""What each detected shape attends to most in the demo's validation images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Optional

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image

from ..attention import AttentionQuery, AttentionRecorder, explorer_page
from ..checkpoint.predictor import Predictor
from .outcome import Detection, Scene

Key = tuple[float, float, float]  # (x, y, weight)


class Attending:
    """Runs the model that has a block on images, and reads the block's attention.

    Args:
        predictor: The model.
        image_root: Folder of the images.
        model: Index of the model in `Shape.detections`.
        class_names: Names of the classes.
    """

    def __init__(
        self, predictor: Predictor, image_root: str, model: int, class_names: list[str]
    ) -> None:
        self._predictor = predictor
        self._root = image_root
        self._model = model
        self._class_names = class_names
        self._recorder = AttentionRecorder(predictor.model)

    def image(self, scene: Scene) -> np.ndarray:
        """The image, RGB uint8 (H, W, 3)."""
        with Image.open(os.path.join(self._root, scene.file_name)) as opened:
            return np.asarray(opened.convert("RGB"))

    def top_keys(self, scenes: Iterable[Scene]) -> dict[int, list[Optional[Key]]]:
        """By image id, the key of the largest weight for each shape; None if it is not detected."""
        return {scene.image_id: self._top_keys(scene) for scene in scenes}

    def _top_keys(self, scene: Scene) -> list[Optional[Key]]:
        block = self._record(scene)
        return [
            None if d is None else self._recorder.top_k(block, _center(d), 1)[0]
            for d in self._found(scene)
        ]

    def mean_map(self, scene: Scene) -> Optional[np.ndarray]:
        """The mean attention map (H, W) of the detected shapes; None if there is none."""
        block = self._record(scene)
        centers = [_center(d) for d in self._found(scene) if d is not None]
        if not centers:
            return None
        return self._recorder.attention_maps(block, centers).mean(axis=0)

    def explorer(self, scene: Scene) -> str:
        """The explorer page of an image, the most confident detection first."""
        self._record(scene)
        found = sorted(filter(None, self._found(scene)), key=lambda d: -d["score"])
        queries = [self._query(number, d) for number, d in enumerate(found, start=1)]
        return explorer_page(self.image(scene), queries, self._recorder, title=scene.file_name)

    def _query(self, number: int, detection: Detection) -> AttentionQuery:
        x, y, width, height = detection["bbox"]
        name = self._class_names[detection["category_id"] - 1]
        label = f"{number} {name} {detection['score']:.0%}"
        return AttentionQuery(_center(detection), label, (x, y, x + width, y + height))

    def _found(self, scene: Scene) -> list[Optional[Detection]]:
        return [shape.detections[self._model] for shape in scene.shapes]

    def _record(self, scene: Scene) -> str:
        """Record a call for an image; return the name of the block."""
        image = read_image(os.path.join(self._root, scene.file_name), "BGR")
        with self._recorder:
            self._predictor(image)
        return self._recorder.recorded_blocks[0]


def _center(detection: Detection) -> tuple[float, float]:
    x, y, width, height = detection["bbox"]
    return x + width / 2, y + height / 2
