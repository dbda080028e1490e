"""Generator of synthetic images in which an object's class depends on a cue far away from it.

Each image shows one glowing lamp and a few shapes. A shape's category is the lamp's color, and the
lamp sheds no light on the shapes: for a given seed, the pixels of every shape are the same under
all three lamps. So a detector can classify an object only from the lamp elsewhere in the image,
which is what non-local blocks are for. As a control, the same images can be labeled by a local cue,
the outline of each shape; then the lamp carries no information.

Shapes are polygons, rasterized by their exact signed distance, so that the annotated polygon and
the painted edge agree to a fraction of a pixel. They overlap neither each other nor the lamp's
halo.

Coordinates are continuous (x, y) in pixels: the top left corner of the image is (0, 0), and the
center of its first pixel is (0.5, 0.5). Colors are RGB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .raster import (
    blend,
    box_around,
    coverage,
    cross,
    overlap,
    pixel_centers,
    regular,
    rounded,
    signed_distance,
    star,
)

# Shape symbols: H, W: height and width of the image in pixels. V: vertices of one polygon.

# Change this whenever the same seed and parameters would give other images or annotations.
GENERATOR_VERSION = 1

LAMP_COLORS = {"amber": (255, 168, 28), "teal": (0, 214, 178), "violet": (168, 84, 255)}
# The categories for each cue that can decide a shape's category.
CATEGORIES = {"lamp": tuple(LAMP_COLORS), "outline": ("round", "pointed", "square")}

_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
# Each a pair: the colors at the two ends of the background's gradient.
_BACKGROUNDS = (
    ((50, 58, 74), (30, 35, 47)),
    ((56, 56, 68), (34, 34, 44)),
    ((48, 62, 70), (28, 37, 44)),
)
_PASTELS = (
    (232, 226, 214),
    (205, 210, 219),
    (222, 197, 184),
    (190, 206, 190),
    (178, 196, 217),
    (208, 192, 211),
    (224, 216, 190),
)
_SHADOW_REACH = 5.0  # pixels over which a shape's shadow fades
_SHADOW_SHIFT = (1, 2)  # (x, y) in whole pixels
_SHADOW_STRENGTH = 0.45

_Circle = tuple[float, float, float]  # x, y, radius


@dataclass(frozen=True)
class LampsParams:
    """Parameters of the images. Ranges are (low, high), both ends included.

    Annotation files store them under these names.

    Attributes:
        side: Range of height and width of the image in pixels, which are sampled independently.
        width: Range of the width, if it differs from that of the height, or None.
        num_shapes: Range of the number of shapes.
        shape_size: Range of the diameter in pixels of the circle around a shape.
        lamp_size: Range of the diameter of the lamp in pixels.
        halo: Radius of the lamp's glow, in radii of the lamp. No light passes beyond it.
        gap: Minimum free space in pixels around a shape.
        decided_by: Cue that decides the category, "lamp" or "outline"; the images are the same.
        lamp_counts: Whether the lamp is an object too, with the category of its color or of its
            round outline; the images are the same.
    """

    side: tuple[int, int] = (112, 160)
    width: tuple[int, int] | None = None
    num_shapes: tuple[int, int] = (2, 5)
    shape_size: tuple[float, float] = (26.0, 56.0)
    lamp_size: tuple[float, float] = (20.0, 26.0)
    halo: float = 2.8
    gap: float = 3.0
    decided_by: str = "lamp"
    lamp_counts: bool = False

    def __post_init__(self) -> None:
        for name in ("side", "width", "num_shapes", "shape_size", "lamp_size"):
            low, high = getattr(self, name) or self.side
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high: {low, high}")
        if self.halo < 1:
            raise ValueError(f"halo must be at least 1, the lamp's own radius: {self.halo}")
        if self.gap < 1:
            raise ValueError(f"gap must be at least 1, or edges would mix: {self.gap}")
        if self.decided_by not in CATEGORIES:
            raise ValueError(f"decided_by must be one of {tuple(CATEGORIES)}: {self.decided_by!r}")

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories."""
        return CATEGORIES[self.decided_by]


@dataclass(frozen=True)
class Lamp:
    """The lamp of an image.

    Attributes:
        color: Index into `LAMP_COLORS`.
        center: Center (x, y) in pixels.
        radius: Radius in pixels.
    """

    color: int
    center: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Instance:
    """An annotated object.

    Attributes:
        category: Index of the category.
        polygon: Outline (V, 2) as (x, y) in pixels.
        mask: Boolean mask (H, W).
    """

    category: int
    polygon: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class _Shape:
    """A shape to paint.

    Attributes:
        outline: Kind of outline, an index into the categories of "outline".
        polygon: Outline (V, 2) as (x, y) in pixels.
        color: RGB color.
        corner: First pixel (x, y) of a box around the shape, which may extend beyond the image.
        distance: Signed distance to the polygon at the pixels of the box.
    """

    outline: int
    polygon: np.ndarray
    color: tuple[int, int, int]
    corner: tuple[int, int]
    distance: np.ndarray


def render_image(
    rng: np.random.Generator, params: LampsParams | None = None, *, color: int | None = None
) -> tuple[np.ndarray, list[Instance], Lamp]:
    """Render one image.

    Args:
        rng: Random number generator for everything that the parameters leave open.
        params: Parameters of the image; by default `LampsParams()`.
        color: Color of the lamp, an index into `LAMP_COLORS`; None samples it. For the same state
            of ``rng``, it changes the pixels of the lamp and its halo only.

    Returns:
        The image (H, W, 3), RGB uint8; its instances, whose masks are disjoint; its lamp.

    Raises:
        ValueError: If the color is not one of the lamp's, or the shapes do not fit in the image.
    """
    params = params or LampsParams()
    if color is not None and color not in range(len(LAMP_COLORS)):
        raise ValueError(f"color must be an index into {tuple(LAMP_COLORS)} or None: {color}")
    # Sampled even if a color is given, so that the random numbers after it are the same.
    sampled = int(rng.integers(len(LAMP_COLORS)))
    color = sampled if color is None else color

    (low, high), (left, right) = params.side, params.width or params.side
    height, width = (int(side) for side in rng.integers((low, left), (high, right), endpoint=True))
    (lamp_x, lamp_y, lamp_radius), circles = _arrange(rng, params, height, width)
    lamp = Lamp(color, (lamp_x, lamp_y), lamp_radius)
    shapes = _sample_shapes(rng, circles)
    canvas = _background(rng, height, width)
    for shape in shapes:
        _paint_shadow(canvas, shape)
    _paint_lamp(canvas, lamp, params.halo * lamp.radius)
    # Shapes come last: they cover the bit of a neighbor's shadow that would fall on them.
    by_lamp = params.decided_by == "lamp"
    instances = [
        Instance(color if by_lamp else shape.outline, shape.polygon, _paint_shape(canvas, shape))
        for shape in shapes
    ]
    if params.lamp_counts:
        instances.append(_lamp_instance(lamp, color if by_lamp else 0, canvas.shape[:2]))
    return np.rint(canvas).astype(np.uint8), instances, lamp


def _arrange(
    rng: np.random.Generator, params: LampsParams, height: int, width: int
) -> tuple[_Circle, list[_Circle]]:
    """Arrange the lamp and the shapes without overlap; return the circles around them."""
    lamp_radius = rng.uniform(*params.lamp_size) / 2
    count = int(rng.integers(*params.num_shapes, endpoint=True))
    low, high = params.shape_size
    # Large ones first: they are the hardest to fit in.
    radii = np.sort(rng.uniform(low, high, size=count))[::-1] / 2
    for _ in range(200):
        lamp_xy = _random_point(rng, height, width, 1.5 * lamp_radius)
        circles = [(*lamp_xy, params.halo * lamp_radius)]
        for radius in radii:
            circle = _find_room(rng, circles, float(radius), params.gap, height, width)
            if circle is None:
                break
            circles.append(circle)
        else:
            return (*lamp_xy, lamp_radius), circles[1:]
        # Too crowded: retry with slightly smaller shapes.
        radii = np.maximum(radii * 0.95, low / 2)
    raise ValueError(f"found no room for {count} shapes in {width} x {height} pixels: {params}")


def _find_room(
    rng: np.random.Generator,
    taken: list[_Circle],
    radius: float,
    gap: float,
    height: int,
    width: int,
) -> _Circle | None:
    """Return a random circle at least ``gap`` from all others and the border; None if not found."""
    if 2 * (radius + gap) > min(height, width):
        return None
    for _ in range(30):
        x, y = _random_point(rng, height, width, radius + gap)
        if all(math.hypot(x - u, y - v) >= radius + r + gap for u, v, r in taken):
            return x, y, radius
    return None


def _random_point(
    rng: np.random.Generator, height: int, width: int, margin: float
) -> tuple[float, float]:
    return float(rng.uniform(margin, width - margin)), float(rng.uniform(margin, height - margin))


def _sample_shapes(rng: np.random.Generator, circles: list[_Circle]) -> list[_Shape]:
    """Sample outline and color of a shape in each circle."""
    colors = rng.permutation(len(_PASTELS))
    shapes = []
    for i, (x, y, radius) in enumerate(circles):
        outline, polygon = _random_polygon(rng)
        pastel = _PASTELS[colors[i % len(colors)]]
        shapes.append(_make_shape(outline, polygon * radius + (x, y), pastel))
    return shapes


def _random_polygon(rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """Sample a shape with a random rotation that just fits the unit circle.

    Returns:
        Kind of outline, an index into the categories of "outline", and the polygon (V, 2).
    """
    kind = int(rng.integers(len(_UNIT_POLYGONS)))
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    turned = _UNIT_POLYGONS[kind] @ np.array([[cos, sin], [-sin, cos]])
    return kind % len(CATEGORIES["outline"]), turned


# Alternately round, pointed and square.
_UNIT_POLYGONS = (
    regular(40),  # a disk: 40 corners stay within 0.1 pixel of the circle at these sizes
    rounded(regular(3), 0.14),
    rounded(regular(4), 0.12),
    rounded(regular(6), 0.12),
    rounded(star(5, 0.5), 0.12),
    rounded(cross(0.36), 0.12),
)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a soft gradient in a random direction: (H, W, 3), float, 0 to 255."""
    first, last = np.array(_BACKGROUNDS[int(rng.integers(len(_BACKGROUNDS)))], dtype=float)
    angle = rng.uniform(0, 2 * math.pi)
    x, y = pixel_centers(0, 0, width, height)
    along = math.cos(angle) * (x / width - 0.5) + math.sin(angle) * (y / height - 0.5)
    along = along / (abs(math.cos(angle)) + abs(math.sin(angle))) + 0.5  # 0 to 1 corner to corner
    return first + along[..., None] * (last - first)


def _paint_lamp(canvas: np.ndarray, lamp: Lamp, reach: float) -> None:
    """Paint the lamp and a halo that ends exactly ``reach`` pixels from its center, in place."""
    color = tuple(LAMP_COLORS.values())[lamp.color]
    corner, x, y = box_around(np.array([lamp.center]), reach)
    distance = np.hypot(x - lamp.center[0], y - lamp.center[1])

    fade = np.clip((reach - distance) / (reach - 0.5 * lamp.radius), 0, 1)
    blend(canvas, corner, color, 0.75 * fade**2)
    blend(canvas, corner, color, coverage(distance - lamp.radius))
    # A faint highlight inside makes the disk look like a light; its rim keeps the pure color.
    blend(canvas, corner, _WHITE, 0.55 * np.clip(1 - distance / (0.75 * lamp.radius), 0, 1))


def _lamp_instance(lamp: Lamp, category: int, canvas: tuple[int, int]) -> Instance:
    """Return the lamp without its halo as an object."""
    disk = _UNIT_POLYGONS[0] * lamp.radius + lamp.center
    x, y = pixel_centers(0, 0, canvas[1], canvas[0])
    return Instance(category, disk, signed_distance(x, y, disk) < 0)


def _make_shape(outline: int, polygon: np.ndarray, color: tuple[int, int, int]) -> _Shape:
    corner, x, y = box_around(polygon, _SHADOW_REACH)
    return _Shape(outline, polygon, color, corner, signed_distance(x, y, polygon))


def _paint_shadow(canvas: np.ndarray, shape: _Shape) -> None:
    fade = np.clip((_SHADOW_REACH - shape.distance) / (2 * _SHADOW_REACH), 0, 1)
    corner = shape.corner[0] + _SHADOW_SHIFT[0], shape.corner[1] + _SHADOW_SHIFT[1]
    blend(canvas, corner, _BLACK, _SHADOW_STRENGTH * fade**2)


def _paint_shape(canvas: np.ndarray, shape: _Shape) -> np.ndarray:
    """Paint a shape in place; return its boolean mask (H, W), True where a pixel's center is in."""
    blend(canvas, shape.corner, shape.color, coverage(shape.distance))
    mask = np.zeros(canvas.shape[:2], dtype=bool)
    on_canvas, on_box = overlap(mask.shape, shape.corner, shape.distance.shape)
    mask[on_canvas] = shape.distance[on_box] < 0
    return mask
