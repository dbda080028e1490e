"""Labels on images: text on a colored ground, where there is room for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

import matplotlib.font_manager
import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK = (16, 18, 24)  # of text and outlines, RGB
_PAD = 0.28  # of a label around its text, in sizes of the font

Place = tuple[float, float, float, float]  # x0, y0, x1, y1


def mean_side(image: np.ndarray) -> float:
    """The side of a square of the image's area: marks suit wide images, too."""
    return math.sqrt(image.shape[0] * image.shape[1])


def with_free_label(
    image: np.ndarray,
    box: Sequence[float],
    label: str,
    color: tuple[int, int, int],
    taken: list[Place],
) -> np.ndarray:
    """Draw a label above, below or inside a box, where no other one is; add its place to them.

    Without a free place it is reduced to its first word, or else left out, unless it is the only
    one.
    """
    for text in (label, label.split(" ")[0]):
        for place in _places_at(image, box, text):
            if not any(_overlap(place, other) for other in taken):
                taken.append(place)
                return with_label(image, place[:2], text, color)
    return image if taken else with_label(image, (max(box[0], 0), max(box[1], 0)), label, color)


def _places_at(image: np.ndarray, box: Sequence[float], text: str) -> Iterator[Place]:
    """Places in the image for a text at a box, the best first."""
    width, height = label_size(image, text)
    x0, y0, x1, y1 = box
    for x, y in product((x0, x1 - width), (y0 - height, y1, y0, y1 - height)):
        left = min(max(x, 0), max(image.shape[1] - width, 0))
        if 0 <= y <= image.shape[0] - height:
            yield left, y, left + width, y + height


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def with_label(
    image: np.ndarray, corner: tuple[float, float], text: str, color: tuple[int, int, int]
) -> np.ndarray:
    """Write a label whose top left corner is at ``corner``."""
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    font = _label_font(image)
    left, top, _, _ = pen.textbbox((0, 0), text, font=font)
    x, y = corner
    width, height = label_size(image, text)
    pad = font.size * _PAD
    pen.rounded_rectangle((x, y, x + width, y + height), pad * 0.6, fill=color)
    pen.text((x + pad - left, y + pad - top), text, fill=INK, font=font)
    return np.asarray(canvas).copy()


def label_size(image: np.ndarray, text: str) -> tuple[float, float]:
    """Width and height of a label in pixels of the image that it is written on."""
    font = _label_font(image)
    left, top, right, bottom = font.getbbox(text)
    return right - left + 2 * _PAD * font.size, bottom - top + 2 * _PAD * font.size


def _label_font(image: np.ndarray) -> ImageFont.FreeTypeFont:
    return _font(max(round(mean_side(image) / 34), 9))


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships, at a size in pixels."""
    return ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), size)
