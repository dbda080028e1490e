"""What the images show, and how it is painted: a background, glowing lamps, and flat shapes.

A canvas is a float array (H, W, 3), RGB from 0 to 255, painted in place. Coordinates are continuous
(x, y) in pixels; see raster.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .raster import blend, box_around, coverage, overlap, pixel_centers, regular, signed_distance

# Shape symbols: H, W: height and width of the image in pixels. V: vertices of one polygon.

LAMP_COLORS = {"amber": (255, 168, 28), "teal": (0, 214, 178), "violet": (168, 84, 255)}

# Colors of the shapes and of the lamps' cores, in images to match; 90 degrees of hue apart.
TONES = {
    "rose": (239, 143, 143),
    "lime": (191, 239, 143),
    "aqua": (143, 239, 239),
    "lilac": (191, 143, 239),
}
# Colors of shapes in other images.
PASTELS = (
    (232, 226, 214),
    (205, 210, 219),
    (222, 197, 184),
    (190, 206, 190),
    (178, 196, 217),
    (208, 192, 211),
    (224, 216, 190),
)

DISK = regular(40)  # its edge is within 0.1 pixel of the circle at the sizes here
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
# Each a pair: the colors at the two ends of the background's gradient.
_BACKGROUNDS = (
    ((50, 58, 74), (30, 35, 47)),
    ((56, 56, 68), (34, 34, 44)),
    ((48, 62, 70), (28, 37, 44)),
)
_SHADOW_REACH = 5.0  # pixels over which a shape's shadow fades
_SHADOW_SHIFT = (1, 2)  # (x, y) in whole pixels
_SHADOW_STRENGTH = 0.45


@dataclass(frozen=True)
class Lamp:
    """A lamp of an image, a disk.

    Attributes:
        color: Index into `LAMP_COLORS`.
        center: Center (x, y) in pixels.
        radius: Radius in pixels.
        tone: Tone of its core, an index into `TONES`; None for a highlight instead of a core.
    """

    color: int
    center: tuple[float, float]
    radius: float
    tone: int | None = None
    outline: ClassVar[int] = 0  # kind of outline, as of a shape

    @property
    def polygon(self) -> np.ndarray:
        """Outline (V, 2) as (x, y) in pixels."""
        return DISK * self.radius + self.center


@dataclass(frozen=True)
class Shape:
    """A shape to paint.

    Attributes:
        outline: Kind of outline, an index into the categories of "outline".
        polygon: Outline (V, 2) as (x, y) in pixels.
        color: RGB color.
        corner: First pixel (x, y) of a box around the shape, which may extend beyond the image.
        distance: Signed distance to the polygon at the pixels of the box.
        tone: Tone, an index into `TONES`; None if it has another color.
    """

    outline: int
    polygon: np.ndarray
    color: tuple[int, int, int]
    corner: tuple[int, int]
    distance: np.ndarray
    tone: int | None


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a canvas (H, W, 3) with a soft gradient in a random direction."""
    first, last = np.array(_BACKGROUNDS[int(rng.integers(len(_BACKGROUNDS)))], dtype=float)
    angle = rng.uniform(0, 2 * math.pi)
    x, y = pixel_centers(0, 0, width, height)
    along = math.cos(angle) * (x / width - 0.5) + math.sin(angle) * (y / height - 0.5)
    along = along / (abs(math.cos(angle)) + abs(math.sin(angle))) + 0.5  # 0 to 1 corner to corner
    return first + along[..., None] * (last - first)


def paint_lamp(canvas: np.ndarray, lamp: Lamp, reach: float) -> None:
    """Paint a lamp and a halo that ends ``reach`` pixels from its center."""
    color = tuple(LAMP_COLORS.values())[lamp.color]
    corner, x, y = box_around(np.array([lamp.center]), reach)
    distance = np.hypot(x - lamp.center[0], y - lamp.center[1])
    fade = np.clip((reach - distance) / (reach - 0.5 * lamp.radius), 0, 1)
    blend(canvas, corner, color, 0.75 * fade**2)
    blend(canvas, corner, color, coverage(distance - lamp.radius))
    # Its rim keeps the pure color.
    if lamp.tone is None:  # a faint highlight makes it look like a light
        blend(canvas, corner, _WHITE, 0.55 * np.clip(1 - distance / (0.75 * lamp.radius), 0, 1))
    else:
        core = tuple(TONES.values())[lamp.tone]
        blend(canvas, corner, core, coverage(distance - 0.7 * lamp.radius))


def make_shape(
    outline: int, polygon: np.ndarray, color: tuple[int, int, int], tone: int | None
) -> Shape:
    """Return a shape with what is needed to paint it."""
    corner, x, y = box_around(polygon, _SHADOW_REACH)
    return Shape(outline, polygon, color, corner, signed_distance(x, y, polygon), tone)


def paint_shadow(canvas: np.ndarray, shape: Shape) -> None:
    """Paint the shadow of a shape."""
    fade = np.clip((_SHADOW_REACH - shape.distance) / (2 * _SHADOW_REACH), 0, 1)
    corner = shape.corner[0] + _SHADOW_SHIFT[0], shape.corner[1] + _SHADOW_SHIFT[1]
    blend(canvas, corner, _BLACK, _SHADOW_STRENGTH * fade**2)


def paint_shape(canvas: np.ndarray, shape: Shape) -> np.ndarray:
    """Paint a shape; return its boolean mask (H, W), True where a pixel's center is in."""
    blend(canvas, shape.corner, shape.color, coverage(shape.distance))
    mask = np.zeros(canvas.shape[:2], dtype=bool)
    on_canvas, on_box = overlap(mask.shape, shape.corner, shape.distance.shape)
    mask[on_canvas] = shape.distance[on_box] < 0
    return mask
