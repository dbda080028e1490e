"""Draws what the models of the demo detect in an image, and what the block attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import cv2
import numpy as np
from matplotlib.figure import Figure
from pycocotools import mask as mask_util

from ..attention import draw_arrows, draw_mask, overlay_attention, resize_longest_side
from ..attention.figures.labels import INK
from .outcome import Detection, Scene

LENGTH = 1536  # pixels of the longer side of a drawing
ARROW = (255, 255, 255)
WRONG = (255, 59, 78)
MISSED = (150, 150, 150)


def draw_scene(
    image: np.ndarray,
    scene: Scene,
    model: int,
    colors: Sequence[tuple[int, int, int]],
    *,
    attn_map: Optional[np.ndarray] = None,
    top_keys: Sequence[Optional[tuple[float, float, float]]] = (),
) -> np.ndarray:
    """Draw what a model says of each shape of an image, in the color of the class.

    A wrong class is crossed out; a shape that is not detected gets a gray cross.

    Args:
        image: RGB uint8 image (H, W, 3).
        scene: The image's objects and detections.
        model: Index of the model.
        colors: RGB color of each class.
        attn_map: Attention map (H, W) to overlay.
        top_keys: For each shape a key (x, y, weight) to draw an arrow to, or None.

    Returns:
        RGB uint8 image whose longer side is `LENGTH`.
    """
    drawn, factor = resize_longest_side(image, LENGTH)
    if attn_map is not None:
        resized = cv2.resize(attn_map, drawn.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        drawn = overlay_attention(drawn, resized)
    found = [shape.detections[model] for shape in scene.shapes]
    for detection in filter(None, found):
        color = colors[detection["category_id"] - 1]
        drawn = draw_mask(drawn, _mask(detection, image.shape[:2]), color=color)
    for shape, key in zip(scene.shapes, top_keys):
        if key is not None:
            start = _center(shape.box, factor)
            end = (key[0] * factor, key[1] * factor, 1.0)
            drawn = draw_arrows(drawn, start, [end], color=ARROW, bow=_bow(start, end, drawn))
    for shape, detection in zip(scene.shapes, found):
        if not shape.is_correct(model):
            cross = MISSED if detection is None else WRONG
            drawn = _with_cross(drawn, _center(shape.box, factor), cross)
    return drawn


def comparison_figure(
    strips: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str]
) -> Figure:
    """Images one below the other, each once for each model.

    Args:
        strips: For each image the drawings of `draw_scene`, one for each model.
        names: Names of the models.
    """
    height, width = strips[0][0].shape[:2]
    rows = len(strips) * len(names)
    figure = Figure(figsize=(8.0, rows * (8.0 * height / width + 0.22)), dpi=200)
    panels = figure.subplots(rows, 1, gridspec_kw={"hspace": 0.24}, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0, right=1, bottom=0.005, top=1 - 0.2 / figure.get_figheight())
    for panel, (strip, name) in zip(
        panels, [(s, n) for pair in strips for s, n in zip(pair, names)]
    ):
        panel.imshow(strip, aspect="auto", interpolation="antialiased")
        panel.set_axis_off()
        panel.set_title(name, loc="left", pad=3, fontsize=7.5)
    return figure


def _mask(detection: Detection, size: tuple[int, int]) -> np.ndarray:
    """The mask of a detection (H, W), or its box where it has none."""
    if "segmentation" in detection:
        return mask_util.decode(detection["segmentation"]).astype(bool)
    x, y, width, height = detection["bbox"]
    rows, columns = np.indices(size) + 0.5
    return (x <= columns) & (columns < x + width) & (y <= rows) & (rows < y + height)


def _center(box: Sequence[float], factor: float) -> tuple[float, float]:
    x, y, width, height = box
    return (x + width / 2) * factor, (y + height / 2) * factor


def _bow(start: Sequence[float], end: Sequence[float], image: np.ndarray) -> float:
    """Height of an arrow's arc: through the free part of the image, above or below."""
    height = image.shape[0]
    middle = (start[1] + end[1]) / 2
    room = 0.8 * (middle if middle > height / 2 else height - middle)
    bow = min(0.12 * abs(end[0] - start[0]), room - 0.1 * height)
    return bow if middle > height / 2 else -bow


def _with_cross(
    image: np.ndarray, center: tuple[float, float], color: tuple[int, int, int]
) -> np.ndarray:
    result, radius = image.copy(), image.shape[1] / 130
    x, y = center
    for ink, width in ((INK, 3.0), (color, 1.6)):
        thickness = max(round(width * image.shape[1] / 640), 1)
        for sign in (1, -1):
            ends = [(round(x + end * radius), round(y + end * sign * radius)) for end in (1, -1)]
            cv2.line(result, *ends, ink, thickness, cv2.LINE_AA)
    return result
