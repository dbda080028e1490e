"""Drawing on images: attention maps, arrows, points, boxes and detections.

Images are RGB uint8 arrays of shape (H, W, 3); every function returns a new array and leaves its
input unchanged. Coordinates are continuous (x, y) in pixels of the given image: (0.5, 0.5) is the
center of its first pixel.
"""

from __future__ import annotations

import math
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

from ..utils.deprecation import renamed_arguments

SEQUENTIAL = "inferno"
DIVERGING = "RdBu_r"

# Colors of marks, RGB: neither the image nor the attention map is likely to have them.
ACCENT = (118, 240, 255)
SIGNED_ACCENT = (255, 216, 61)
# The colors of Okabe and Ito, distinguishable with any kind of color vision.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
_INK = (16, 18, 24)
# OpenCV takes subpixel coordinates as integers with this many fractional bits.
_SHIFT = 6
_PAD = 0.28  # of a label around its text, in sizes of the font


def check_image(image: np.ndarray) -> None:
    """Raise a ValueError unless ``image`` is RGB uint8 (H, W, 3) with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"The image is {image.dtype} of shape {list(image.shape)}; it must be RGB, uint8, of "
            f"shape (H, W, 3)."
        )


@renamed_arguments(longest="target_length")
def resize_longest_side(image: np.ndarray, target_length: int) -> tuple[np.ndarray, float]:
    """Resize an image so that its longer side has ``target_length`` pixels.

    Args:
        image: RGB uint8 image (H, W, 3).
        target_length: Length of the longer side of the result in pixels.

    Returns:
        The resized image and the scale factor.
    """
    check_image(image)
    factor = target_length / max(image.shape[:2])
    height, width = (max(round(side * factor), 1) for side in image.shape[:2])
    method = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_AREA
    return cv2.resize(image, (width, height), interpolation=method), factor


def max_magnitude(attn_map: np.ndarray) -> float:
    """The largest magnitude in an attention map, ignoring NaN; 1 if there is none above zero."""
    largest = float(np.nan_to_num(np.abs(attn_map)).max(initial=0.0))
    return largest if largest > 0 else 1.0


def is_signed(attn_map: np.ndarray) -> bool:
    """Whether an attention map has negative weights, as those of the dot product may."""
    return bool((attn_map < 0).any())


@renamed_arguments(heat="attn_map", limit="vmax")
def overlay_attention(
    image: np.ndarray,
    attn_map: np.ndarray,
    *,
    vmax: Optional[float] = None,
    signed: Optional[bool] = None,
    opacity: float = 0.85,
) -> np.ndarray:
    """Overlay an attention map on an image, as opaque as the weights are large.

    Args:
        image: RGB uint8 image (H, W, 3).
        attn_map: Float attention map (H, W); the image shows unchanged where it is 0 or NaN.
        vmax: Magnitude of the weight drawn in the strongest color. Default: the largest in
            ``attn_map``.
        signed: Use a diverging colormap around zero instead of a sequential one from zero up.
            Default: `is_signed` of ``attn_map``.
        opacity: Opacity of the strongest color, from 0 to 1.

    Returns:
        RGB uint8 image (H, W, 3).

    Raises:
        ValueError: If ``image`` is not RGB uint8, or the two sizes differ.
    """
    check_image(image)
    if attn_map.shape != image.shape[:2]:
        raise ValueError(
            f"The attention map is {list(attn_map.shape)}, the image {list(image.shape[:2])}."
        )
    signed = is_signed(attn_map) if signed is None else signed
    relative = np.nan_to_num(attn_map) / (vmax or max_magnitude(attn_map))
    relative = np.clip(relative, -1 if signed else 0, 1)
    colormap = matplotlib.colormaps[DIVERGING if signed else SEQUENTIAL]
    colors = colormap((relative + 1) / 2 if signed else relative)[..., :3] * 255
    # Most weights are near zero: there the image itself shows, so that it stays readable.
    alpha = (opacity * np.abs(relative))[..., None]
    return (image * (1 - alpha) + colors * alpha + 0.5).astype(np.uint8)


@renamed_arguments(targets="top_keys")
def draw_arrows(
    image: np.ndarray,
    point: tuple[float, float],
    top_keys: Sequence[tuple[float, float, float]],
    *,
    color: tuple[int, int, int] = ACCENT,
    bow: float = 0.0,
) -> np.ndarray:
    """Draw arrows from a query point to keys, as in Figure 3 of Wang et al., CVPR 2018.

    Keys with less than a twentieth of the largest weight get no arrow. An arrow ends beside its
    key, which stays visible.

    Args:
        image: RGB uint8 image (H, W, 3).
        point: Query point (x, y) in pixels of ``image``.
        top_keys: Keys (x, y, weight) in pixels of ``image``; arrows fade with the magnitude of
            the weight.
        color: RGB color of the arrows.
        bow: Height of the arrows' arcs in pixels of ``image``; upwards if positive.

    Returns:
        RGB uint8 image (H, W, 3).
    """
    check_image(image)
    result = image
    width = _line_width(image)
    largest = max((abs(weight) for *_, weight in top_keys), default=0.0) or 1.0
    for x, y, weight in reversed(top_keys):
        if abs(weight) < largest / 20:
            continue
        layer = result.copy()
        _paint_arrow(layer, point, (x, y), width, color, bow)
        alpha = 0.25 + 0.75 * abs(weight) / largest
        result = cv2.addWeighted(layer, alpha, result, 1 - alpha, 0)
    return _with_disc(result, point, 2.2 * width, color)


def _paint_arrow(
    image: np.ndarray,
    start: tuple[float, float],
    end: tuple[float, float],
    width: float,
    color: tuple[int, int, int],
    bow: float,
) -> None:
    """Draw an arrow in place, with a dark outline; a disc if the arrow has hardly any length."""
    a, b = np.array(start), np.array(end)
    if float(np.linalg.norm(b - a)) < 9 * width:
        _paint_disc(image, end, 1.6 * width, color)
        return
    # A parabola whose vertex is ``bow`` above the middle; the head ends short of the key.
    control = (a + b) / 2 - [0, 2 * bow]
    t = np.linspace(0, 1, 1025)[:, None]
    path = (1 - t) ** 2 * a + 2 * t * (1 - t) * control + t**2 * b
    left = np.linalg.norm(path - b, axis=1)
    shaft, tip = path[left >= 6.5 * width], path[left >= 2 * width][-1]
    direction = (tip - shaft[-1]) / np.linalg.norm(tip - shaft[-1])
    normal = np.array([-direction[1], direction[0]]) * 2.1 * width
    head = [tip, shaft[-1] + normal, shaft[-1] - normal]
    shaft_points, head_points = (
        np.array([_fixed_point(corner) for corner in corners]) for corners in (shaft, head)
    )
    for ink, extra in ((_INK, 1.0), (color, 0.0)):
        thickness = max(round(width + extra), 1)
        cv2.polylines(image, [shaft_points], False, ink, thickness, cv2.LINE_AA, _SHIFT)
        outline = max(round(2 * extra), 1)
        cv2.polylines(image, [head_points], True, ink, outline, cv2.LINE_AA, _SHIFT)
        cv2.fillPoly(image, [head_points], ink, cv2.LINE_AA, _SHIFT)


def draw_point(
    image: np.ndarray,
    point: tuple[float, float],
    label: str = "",
    *,
    color: tuple[int, int, int] = ACCENT,
) -> np.ndarray:
    """Draw a dot with an optional label beside it.

    Args:
        image: RGB uint8 image (H, W, 3).
        point: Center (x, y) of the dot in pixels of ``image``.
        label: Text to write beside the dot.
        color: RGB color of the dot and of the label's background.

    Returns:
        RGB uint8 image (H, W, 3).
    """
    check_image(image)
    radius = 2.2 * _line_width(image)
    result = _with_disc(image, point, radius, color)
    if not label:
        return result
    width, height = _label_size(image, label)
    x = min(max(point[0] + 2 * radius, 0), max(image.shape[1] - width, 0))
    y = min(max(point[1] - radius - height, 0), max(image.shape[0] - height, 0))
    return _with_label(result, (x, y), label, color)


def _with_disc(
    image: np.ndarray, point: tuple[float, float], radius: float, color: tuple[int, int, int]
) -> np.ndarray:
    result = image.copy()
    _paint_disc(result, point, radius, color)
    return result


def _paint_disc(
    image: np.ndarray, point: tuple[float, float], radius: float, color: tuple[int, int, int]
) -> None:
    for ink, r in ((_INK, radius + 1.5), (color, radius)):
        center, r_fixed = _fixed_point(point), round(r * 2**_SHIFT)
        cv2.circle(image, center, r_fixed, ink, cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _fixed_point(point: Any) -> tuple[int, int]:
    """OpenCV's fixed-point coordinates, where (0, 0) is the center of the first pixel."""
    return round((point[0] - 0.5) * 2**_SHIFT), round((point[1] - 0.5) * 2**_SHIFT)


def _line_width(image: np.ndarray) -> float:
    return max(_size(image) / 260, 1.0)


def _size(image: np.ndarray) -> float:
    """The side of a square of the image's area: marks suit wide images, too."""
    return math.sqrt(image.shape[0] * image.shape[1])


def draw_box(
    image: np.ndarray,
    box: Sequence[float],
    label: str = "",
    *,
    color: tuple[int, int, int] = ACCENT,
) -> np.ndarray:
    """Draw a box with an optional label, which stays inside the image, at its top left corner.

    Args:
        image: RGB uint8 image (H, W, 3).
        box: Box (x0, y0, x1, y1) in pixels of ``image``.
        label: Text to write at the corner.
        color: RGB color of the box and of the label's background.

    Returns:
        RGB uint8 image (H, W, 3).
    """
    check_image(image)
    result = image.copy()
    width = _line_width(image)
    x0, y0, x1, y1 = (float(v) for v in box)
    corners = _fixed_point((x0, y0)), _fixed_point((x1, y1))
    for ink, thickness in ((_INK, width + 2), (color, width)):
        cv2.rectangle(result, *corners, ink, max(round(thickness), 1), cv2.LINE_AA, _SHIFT)
    return _with_free_label(result, (x0, y0, x1, y1), label, color, []) if label else result


def _with_label(
    image: np.ndarray, corner: tuple[float, float], text: str, color: tuple[int, int, int]
) -> np.ndarray:
    """Write a label whose top left corner is at ``corner``."""
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    font = _label_font(image)
    left, top, _, _ = pen.textbbox((0, 0), text, font=font)
    x, y = corner
    width, height = _label_size(image, text)
    pad = font.size * _PAD
    pen.rounded_rectangle((x, y, x + width, y + height), pad * 0.6, fill=color)
    pen.text((x + pad - left, y + pad - top), text, fill=_INK, font=font)
    return np.asarray(canvas).copy()


def _label_size(image: np.ndarray, text: str) -> tuple[float, float]:
    """Width and height of a label in pixels of the image that it is written on."""
    font = _label_font(image)
    left, top, right, bottom = font.getbbox(text)
    return right - left + 2 * _PAD * font.size, bottom - top + 2 * _PAD * font.size


def _label_font(image: np.ndarray) -> ImageFont.FreeTypeFont:
    return _font(max(round(_size(image) / 34), 9))


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships, at a size in pixels."""
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), size)


def draw_mask(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    color: tuple[int, int, int] = ACCENT,
    opacity: float = 0.5,
) -> np.ndarray:
    """Fill a mask and draw its outline, smooth at the resolution of the image.

    Args:
        image: RGB uint8 image (H, W, 3), to which the mask is scaled.
        mask: Boolean mask of any size.
        color: RGB color.
        opacity: Opacity of the area, from 0 to 1; the outline is opaque.

    Returns:
        RGB uint8 image (H, W, 3).
    """
    check_image(image)
    soft = _resized_mask(mask, image.shape[1::-1])
    # Distance from the edge, in pixels of the image, where it is small: soft is a blurred step.
    inside = np.clip((soft - 0.5) * 4 + 0.5, 0, 1)
    width = _line_width(image)
    signed = cv2.distanceTransform((soft > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    signed -= cv2.distanceTransform((soft <= 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    line = np.clip(width / 2 + 0.5 - np.abs(signed - np.sign(signed) * 0.5), 0, 1)
    alpha = np.maximum(opacity * inside, line)[..., None]
    return (image * (1 - alpha) + np.array(color) * alpha + 0.5).astype(np.uint8)


def overlay_instances(
    image: np.ndarray,
    instances: Instances,
    labels: Sequence[str],
    *,
    metadata: Optional[Metadata] = None,
    colors: Optional[Sequence[Any]] = None,
) -> np.ndarray:
    """Draw detections on an image of any size: boxes, masks and keypoints, if present.

    A label that has no free place is reduced to its first word, or else left out: labels do not
    overlap.

    Args:
        image: RGB uint8 image (H, W, 3), to which the instances are scaled.
        instances: Predictions for an image of size ``instances.image_size``, (height, width).
        labels: Label of each instance.
        metadata: Metadata of the dataset, which holds the names of keypoints.
        colors: Matplotlib color of each instance. Default: the colors of `PALETTE` in turn.

    Returns:
        RGB uint8 image (H, W, 3).
    """
    check_image(image)
    factor = np.array(image.shape[1::-1]) / instances.image_size[::-1]
    boxes = instances.pred_boxes.tensor.cpu().numpy() * np.tile(factor, 2)
    if colors is None:
        colors = [PALETTE[i % len(PALETTE)] for i in range(len(boxes))]
    inks = [tuple(round(c * 255) for c in to_rgb(color)) for color in colors]
    result = image.copy()
    if instances.has("pred_masks"):
        for mask, ink in zip(instances.pred_masks.cpu().numpy(), inks):
            result = draw_mask(result, mask, color=ink)
    for box, ink in zip(boxes, inks):
        result = draw_box(result, box, color=ink)
    if instances.has("pred_keypoints"):
        drawn = Visualizer(result, metadata)
        for points in instances.pred_keypoints.cpu().numpy() * [*factor, 1.0]:
            drawn.draw_and_connect_keypoints(points)
        result = drawn.output.get_image()
    taken: list[tuple[float, float, float, float]] = []
    for box, label, ink in zip(boxes, labels, inks):
        result = _with_free_label(result, box, label, ink, taken)
    return result


def _with_free_label(
    image: np.ndarray,
    box: Sequence[float],
    label: str,
    color: tuple[int, int, int],
    taken: list[tuple[float, float, float, float]],
) -> np.ndarray:
    """Draw a label above, inside or below a box, where no other one is; add its place to them."""
    height, width = image.shape[:2]
    for text in (label, label.split(" ")[0]):
        label_width, label_height = _label_size(image, text)
        right, below = width - label_width, height - label_height
        for x in (box[0], box[2] - label_width):
            for y in (box[1] - label_height, box[3], box[1], box[3] - label_height):
                left, top = min(max(x, 0), max(right, 0)), y
                place = (left, top, left + label_width, top + label_height)
                if 0 <= top <= below and not any(_overlap(place, other) for other in taken):
                    taken.append(place)
                    return _with_label(image, (left, top), text, color)
    # The only one is never left out, even if it is larger than the image.
    return image if taken else _with_label(image, (max(box[0], 0), max(box[1], 0)), label, color)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a boolean mask (H, W) to (width, height), as floats from 0 to 1; its edge is at 0.5.

    Enlarged ones get smooth edges, not stairs.
    """
    resized = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    blur = 0.7 * size[0] / mask.shape[1]
    if blur > 1:
        # A border of the same values: masks that reach the border of the image still do.
        resized = cv2.GaussianBlur(resized, (0, 0), blur, borderType=cv2.BORDER_REPLICATE)
    return resized
