"""Attention over a picture: heat maps, arrows, boxes.

Pictures are RGB uint8 arrays (H, W, 3); each function returns a new one and leaves its input as it
was. Coordinates are continuous (x, y) in pixels of the picture given: (0.5, 0.5) is the centre of
its first pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Optional

import cv2
import matplotlib
import matplotlib.font_manager
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont

SEQUENTIAL = "inferno"
DIVERGING = "RdBu_r"

# Marks in a color that neither the picture nor the map is likely to have.
ACCENT = (118, 240, 255)
SIGNED_ACCENT = (255, 216, 61)
# Okabe and Ito's colors, which people with any colour vision tell apart.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
_INK = (16, 18, 24)
# cv2 draws at fractions of a pixel, given as integers with this many binary places.
_SHIFT = 6


def check_image(image: np.ndarray) -> None:
    """Raise a ValueError unless ``image`` is RGB uint8 (H, W, 3) with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"The picture is {image.dtype} of shape {list(image.shape)}; it must be RGB, uint8, of "
            f"shape (H, W, 3)."
        )


def resize_longest_side(image: np.ndarray, longest: int) -> tuple[np.ndarray, float]:
    """The picture resized so that its longer side has ``longest`` pixels, and the factor."""
    check_image(image)
    factor = longest / max(image.shape[:2])
    height, width = (max(round(side * factor), 1) for side in image.shape[:2])
    method = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
    return cv2.resize(image, (width, height), interpolation=method), factor


def max_magnitude(heat: np.ndarray) -> float:
    """The largest magnitude of a map, NaN aside; 1 if there is none above zero."""
    largest = float(np.nan_to_num(np.abs(heat)).max(initial=0.0))
    return largest if largest > 0 else 1.0


def is_signed(heat: np.ndarray) -> bool:
    """Whether a map has weights below zero, as the dot product has: they take two colors."""
    return bool((heat < 0).any())


def overlay_attention(
    image: np.ndarray,
    heat: np.ndarray,
    *,
    limit: Optional[float] = None,
    signed: Optional[bool] = None,
    opacity: float = 0.85,
) -> np.ndarray:
    """A map laid over its picture: the larger the weight, the more it covers.

    Args:
        image: RGB uint8 (H, W, 3).
        heat: float (H, W); NaN leaves the picture as it is.
        limit: the weight of the strongest colour; by default the map's own largest magnitude.
        signed: two colours around zero, or one scale from zero up; by default as `is_signed` says.
        opacity: of the strongest colour, from 0 to 1.

    Raises:
        ValueError: if the sizes differ.
    """
    check_image(image)
    if heat.shape != image.shape[:2]:
        raise ValueError(f"The map is {list(heat.shape)}, the picture {list(image.shape[:2])}.")
    signed = is_signed(heat) if signed is None else signed
    share = np.clip(np.nan_to_num(heat) / (limit or max_magnitude(heat)), -1 if signed else 0, 1)
    colors = matplotlib.colormaps[DIVERGING if signed else SEQUENTIAL]
    paint = colors((share + 1) / 2 if signed else share)[..., :3] * 255
    # Weights are mostly near zero: they darken the picture a little, and it stays readable.
    alpha = opacity * (0.45 + 0.55 * np.sqrt(np.abs(share)))
    alpha = np.where(np.isnan(heat), 0.0, alpha)[..., None]
    return (_faded(image) * (1 - alpha) + paint * alpha + 0.5).astype(np.uint8)


def _faded(image: np.ndarray) -> np.ndarray:
    """The picture with half its colour, so that the map's colours are not mistaken; float."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    return 0.5 * image + 0.5 * grey


def draw_arrows(
    image: np.ndarray,
    point: tuple[float, float],
    targets: Sequence[tuple[float, float, float]],
    *,
    color: tuple[int, int, int] = ACCENT,
) -> np.ndarray:
    """Arrows from a point to positions (x, y, weight), fainter for smaller weights.

    As in figure 3 of Wang et al., CVPR 2018. Less than a twentieth of the largest weight gets none.
    """
    check_image(image)
    result = image
    width = _line_width(image)
    strongest = max((abs(weight) for *_, weight in targets), default=0.0) or 1.0
    for x, y, weight in reversed(targets):
        if abs(weight) < strongest / 20:
            continue
        layer = result.copy()
        _arrow(layer, point, (x, y), width, color)
        alpha = 0.25 + 0.75 * abs(weight) / strongest
        result = cv2.addWeighted(layer, alpha, result, 1 - alpha, 0)
    return _dot(result, point, 2.2 * width, color)


def _arrow(
    image: np.ndarray,
    start: tuple[float, float],
    end: tuple[float, float],
    width: float,
    color: tuple[int, int, int],
) -> None:
    """Draw one arrow in place: a dark rim, then the color; a dot where it has no length."""
    a, b = np.array(start), np.array(end)
    length = float(np.linalg.norm(b - a))
    if length < 6 * width:
        _disc(image, end, 1.6 * width, color)
        return
    along = (b - a) / length
    across = np.array([-along[1], along[0]])
    neck = b - along * 4.5 * width
    head = np.array([b, neck + across * 2.1 * width, neck - across * 2.1 * width])
    for ink, extra in ((_INK, 1.0), (color, 0.0)):
        thick = max(round(width + extra), 1)
        cv2.line(image, _fixed(a), _fixed(neck), ink, thick, cv2.LINE_AA, _SHIFT)
        points = np.array([_fixed(corner) for corner in head])
        cv2.polylines(image, [points], True, ink, max(round(2 * extra), 1), cv2.LINE_AA, _SHIFT)
        cv2.fillPoly(image, [points], ink, cv2.LINE_AA, _SHIFT)


def draw_point(
    image: np.ndarray,
    point: tuple[float, float],
    label: str = "",
    *,
    color: tuple[int, int, int] = ACCENT,
) -> np.ndarray:
    """A dot at a point, with a label beside it."""
    check_image(image)
    radius = 2.2 * _line_width(image)
    result = _dot(image, point, radius, color)
    corner = (point[0] + 2 * radius, point[1] - radius)
    return _label(result, corner, label, color) if label else result


def _dot(
    image: np.ndarray, point: tuple[float, float], radius: float, color: tuple[int, int, int]
) -> np.ndarray:
    result = image.copy()
    _disc(result, point, radius, color)
    return result


def _disc(
    image: np.ndarray, point: tuple[float, float], radius: float, color: tuple[int, int, int]
) -> None:
    for ink, r in ((_INK, radius + 1.5), (color, radius)):
        cv2.circle(image, _fixed(point), round(r * 2**_SHIFT), ink, cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _fixed(point: Any) -> tuple[int, int]:
    """To cv2's numbers, where (0, 0) is the centre of the first pixel."""
    return round((point[0] - 0.5) * 2**_SHIFT), round((point[1] - 0.5) * 2**_SHIFT)


def _line_width(image: np.ndarray) -> float:
    return max(max(image.shape[:2]) / 320, 1.0)


def draw_box(
    image: np.ndarray,
    box: Sequence[float],
    label: str = "",
    *,
    color: tuple[int, int, int] = ACCENT,
) -> np.ndarray:
    """A box (x0, y0, x1, y1) with a label at its top left corner, inside the picture."""
    check_image(image)
    result = image.copy()
    width = _line_width(image)
    x0, y0, x1, y1 = (float(v) for v in box)
    for ink, thick in ((_INK, width + 2), (color, width)):
        cv2.rectangle(
            result,
            _fixed((x0, y0)),
            _fixed((x1, y1)),
            ink,
            max(round(thick), 1),
            cv2.LINE_AA,
            _SHIFT,
        )
    return _label(result, (x0, y0), label, color) if label else result


def _label(
    image: np.ndarray, corner: tuple[float, float], text: str, color: tuple[int, int, int]
) -> np.ndarray:
    height, width = image.shape[:2]
    font = _font(max(round(max(height, width) / 42), 9))
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    pad = font.size * 0.28
    wide, high = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(max(corner[0], 0), max(width - wide, 0))
    y = corner[1] - high if corner[1] >= high else min(max(corner[1], 0), max(height - high, 0))
    pen.rounded_rectangle((x, y, x + wide, y + high), pad * 0.6, fill=color)
    pen.text((x + pad - left, y + pad - top), text, fill=_INK, font=font)
    return np.asarray(canvas).copy()


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), size)


def overlay_instances(
    image: np.ndarray,
    instances: Instances,
    labels: Sequence[str],
    *,
    metadata: Optional[Metadata] = None,
    colors: Optional[Sequence[Any]] = None,
) -> np.ndarray:
    """Detections drawn by detectron2's Visualizer, in a picture of any size.

    Args:
        image: RGB uint8; the instances are scaled to it.
        instances: predictions for a picture of ``instances.image_size``; boxes are drawn, and
            masks and keypoints where there are any.
        labels: one text each.
        metadata: of the dataset, for the names of keypoints.
        colors: one matplotlib color each; by default those of ``PALETTE`` in turn.
    """
    check_image(image)
    height, width = image.shape[:2]
    factor = np.array([width, height]) / instances.image_size[::-1]
    boxes = instances.pred_boxes.tensor.cpu().numpy() * np.tile(factor, 2)
    masks = keypoints = None
    if instances.has("pred_masks"):
        masks = [_resized(mask, (width, height)) for mask in instances.pred_masks.cpu().numpy()]
    if instances.has("pred_keypoints"):
        keypoints = instances.pred_keypoints.cpu().numpy() * [*factor, 1.0]
    if colors is None:
        colors = [PALETTE[i % len(PALETTE)] for i in range(len(boxes))]
    drawn = Visualizer(image, metadata).overlay_instances(
        boxes=boxes, masks=masks, keypoints=keypoints, assigned_colors=list(map(to_rgb, colors))
    )
    # The Visualizer's own labels are cut off where a box touches the picture's right edge.
    result = drawn.get_image()
    for box, label, color in zip(boxes, labels, colors):
        result = _label(result, box[:2], label, tuple(round(c * 255) for c in to_rgb(color)))
    return result


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5
