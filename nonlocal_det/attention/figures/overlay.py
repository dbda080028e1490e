"""Drawing on images: attention maps, arrows, points and boxes.

Images are RGB uint8 arrays of shape (H, W, 3); every function returns a new array and leaves its
input unchanged. Coordinates are continuous (x, y) in pixels of the given image: (0.5, 0.5) is the
center of its first pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import cv2
import matplotlib
import matplotlib.font_manager
import numpy as np

from ...utils.deprecation import renamed_arguments
from .labels import INK, label_size, mean_side, with_free_label, with_label

SEQUENTIAL = "inferno"
DIVERGING = "RdBu_r"

# Colors of marks, RGB: neither the image nor the attention map is likely to have them.
ACCENT = (118, 240, 255)
SIGNED_ACCENT = (255, 216, 61)
# OpenCV takes subpixel coordinates as integers with this many fractional bits.
_SHIFT = 6


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
    width = line_width(image)
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
    for ink, extra in ((INK, 1.0), (color, 0.0)):
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
    radius = 2.2 * line_width(image)
    result = _with_disc(image, point, radius, color)
    if not label:
        return result
    width, height = label_size(image, label)
    x = min(max(point[0] + 2 * radius, 0), max(image.shape[1] - width, 0))
    y = min(max(point[1] - radius - height, 0), max(image.shape[0] - height, 0))
    return with_label(result, (x, y), label, color)


def _with_disc(
    image: np.ndarray, point: tuple[float, float], radius: float, color: tuple[int, int, int]
) -> np.ndarray:
    result = image.copy()
    _paint_disc(result, point, radius, color)
    return result


def _paint_disc(
    image: np.ndarray, point: tuple[float, float], radius: float, color: tuple[int, int, int]
) -> None:
    for ink, r in ((INK, radius + 1.5), (color, radius)):
        center, r_fixed = _fixed_point(point), round(r * 2**_SHIFT)
        cv2.circle(image, center, r_fixed, ink, cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _fixed_point(point: Any) -> tuple[int, int]:
    """OpenCV's fixed-point coordinates, where (0, 0) is the center of the first pixel."""
    return round((point[0] - 0.5) * 2**_SHIFT), round((point[1] - 0.5) * 2**_SHIFT)


def line_width(image: np.ndarray) -> float:
    """Width of the lines of marks in pixels."""
    return max(mean_side(image) / 260, 1.0)


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
    width = line_width(image)
    x0, y0, x1, y1 = (float(v) for v in box)
    corners = _fixed_point((x0, y0)), _fixed_point((x1, y1))
    for ink, thickness in ((INK, width + 2), (color, width)):
        cv2.rectangle(result, *corners, ink, max(round(thickness), 1), cv2.LINE_AA, _SHIFT)
    return with_free_label(result, (x0, y0, x1, y1), label, color, []) if label else result
