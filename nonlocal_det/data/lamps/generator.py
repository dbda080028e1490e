"""Generator of synthetic images in which an object's class depends on a cue far away from it.

Each image shows one glowing lamp and a few shapes. A shape's category is the lamp's color, and the
lamp sheds no light on the shapes: for a given seed, the pixels of every shape are the same under
all three lamps. So a detector can classify an object only from the lamp elsewhere in the image,
which is what non-local blocks are for. As a control, the same images can be labeled by a local cue,
the outline of each shape; then the lamp carries no information.

One summary of the image, the same for all of its shapes, is enough there. Hardly so in the images
to match: the shapes of each have three of four tones, and most of these are the core of a lamp,
too, each of another color. A shape's category is the color of the lamp whose core has its tone, or
"unlit". The same images can be labeled by what is local in them: the tone of a shape, and the color
and tone of a lamp.

Shapes are polygons, rasterized by their exact signed distance, so that the annotated polygon and
the painted edge agree to a fraction of a pixel. They overlap neither each other nor a lamp's
halo.

Coordinates are continuous (x, y) in pixels: the top left corner of the image is (0, 0), and the
center of its first pixel is (0.5, 0.5). Colors are RGB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .paint import (
    DISK,
    LAMP_COLORS,
    PASTELS,
    TONES,
    Lamp,
    Shape,
    background,
    make_shape,
    paint_lamp,
    paint_shadow,
    paint_shape,
)
from .raster import cross, pixel_centers, regular, rounded, signed_distance, star

# Shape symbols: H, W: height and width of the image in pixels. V: vertices of one polygon.

# Change this whenever the same seed and parameters would give other images or annotations.
GENERATOR_VERSION = 1

# The categories for each cue that can decide a shape's category.
CATEGORIES = {
    "lamp": tuple(LAMP_COLORS),
    "outline": ("round", "pointed", "square"),
    "match": (*LAMP_COLORS, "unlit"),
    # Of lamps, by color, then by tone; of shapes.
    "tone": (*(f"{color} {tone}" for color in LAMP_COLORS for tone in TONES), *TONES),
}

_MISSING = 0.25  # probability that a tone of an image has no lamp, in the images to match
_Circle = tuple[float, float, float]  # x, y, radius


@dataclass(frozen=True)
class LampsParams:
    """Parameters of the images. Ranges are (low, high), both ends included.

    Annotation files store them under these names.

    Attributes:
        side: Range of height and width of the image in pixels, which are sampled independently.
        width: Range of the width, if it differs from that of the height, or None.
        num_shapes: Range of the number of shapes, lamps not included.
        shape_size: Range of the diameter in pixels of the circle around a shape.
        lamp_size: Range of the diameter of a lamp in pixels.
        halo: Radius of a lamp's glow, in radii of the lamp. No light passes beyond it.
        gap: Minimum free space in pixels around a shape.
        decided_by: What decides the category: "lamp" or "outline", for the same images with one
            lamp; "match" or "tone", for the same images with up to three lamps to match.
        lamp_counts: Whether a lamp is an object too, with the category of its color, of its round
            outline, or of its color and tone; the images are the same.
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
    def to_match(self) -> bool:
        """Whether an image has up to three lamps to match."""
        return self.decided_by in ("match", "tone")

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories."""
        return CATEGORIES[self.decided_by]


@dataclass(frozen=True)
class Instance:
    """An annotated object.

    Attributes:
        category: Index of the category.
        polygon: Outline (V, 2) as (x, y) in pixels.
        mask: Boolean mask (H, W).
        cue: Center (x, y) of its lamp; None if it has none.
    """

    category: int
    polygon: np.ndarray
    mask: np.ndarray
    cue: tuple[float, float] | None


@dataclass(frozen=True)
class Scene:
    """An image and what it shows.

    Attributes:
        image: Image (H, W, 3), RGB uint8.
        instances: Its instances, whose masks are disjoint: the shapes; the lamps, if they count.
        lamps: Its lamps; exactly one, unless they are to match.
    """

    image: np.ndarray
    instances: list[Instance]
    lamps: list[Lamp]


def render_image(
    rng: np.random.Generator, params: LampsParams | None = None, *, color: int | None = None
) -> tuple[np.ndarray, list[Instance], Lamp]:
    """Render one image that has one lamp; see `render_scene` for images to match.

    Args:
        rng: Random number generator for everything that the parameters leave open.
        params: Parameters of the image; by default `LampsParams()`.
        color: Color of the lamp, an index into `LAMP_COLORS`; None samples it. For the same state
            of ``rng``, it changes the pixels of the lamp and its halo only.

    Returns:
        The image (H, W, 3), RGB uint8; its instances, whose masks are disjoint; its lamp.

    Raises:
        ValueError: If the color is not one of the lamp's, the shapes do not fit in the image, or
            the image would be one to match.
    """
    params = params or LampsParams()
    if params.to_match:
        raise ValueError(
            f"render_image is for one lamp; use render_scene for decided_by={params.decided_by!r}."
        )
    if color is not None and color not in range(len(LAMP_COLORS)):
        raise ValueError(f"color must be an index into {tuple(LAMP_COLORS)} or None: {color}")
    scene = render_scene(rng, params, colors=None if color is None else (color,))
    return scene.image, scene.instances, scene.lamps[0]


def render_scene(
    rng: np.random.Generator,
    params: LampsParams | None = None,
    *,
    colors: Sequence[int] | None = None,
) -> Scene:
    """Render one image with any number of lamps.

    Args:
        rng: Random number generator for everything that the parameters leave open.
        params: Parameters of the image; by default `LampsParams()`.
        colors: Different indices into `LAMP_COLORS`, the color of the one lamp or, to match, those
            of the lamps for the three tones, used or not. None samples them. For the same state of
            ``rng``, they change the pixels of the lamps and their halos only.

    Returns:
        The image, its instances and its lamps.

    Raises:
        ValueError: If there are not as many different colors, or the shapes do not fit.
    """
    params = params or LampsParams()
    all_tones = rng.permutation(len(TONES)).tolist() if params.to_match else [None]
    tones = all_tones[: len(LAMP_COLORS)]
    color_of = _sample_lamp_colors(rng, tones, colors)
    (low, high), (left, right) = params.side, params.width or params.side
    height, width = (int(side) for side in rng.integers((low, left), (high, right), endpoint=True))
    lamp_circles, shape_circles = _arrange(rng, params, len(color_of), height, width)
    lamps = [
        Lamp(color, (x, y), radius, tone)
        for (tone, color), (x, y, radius) in zip(color_of.items(), lamp_circles)
    ]
    shapes = _sample_shapes(rng, shape_circles, tones)
    canvas = background(rng, height, width)
    for shape in shapes:
        paint_shadow(canvas, shape)
    for lamp in lamps:
        paint_lamp(canvas, lamp, params.halo * lamp.radius)
    # Shapes come last: they cover the bit of a neighbor's shadow that would fall on them.
    masks = [paint_shape(canvas, shape) for shape in shapes]
    objects: list[tuple[Shape | Lamp, np.ndarray]] = list(zip(shapes, masks))
    if params.lamp_counts:
        objects += [(lamp, _lamp_mask(lamp, height, width)) for lamp in lamps]
    instances = [_label(thing, mask, lamps, params) for thing, mask in objects]
    return Scene(np.rint(canvas).astype(np.uint8), instances, lamps)


def _sample_lamp_colors(
    rng: np.random.Generator, tones: Sequence[int | None], colors: Sequence[int] | None
) -> dict[int | None, int]:
    """Sample the color of each lamp, by its tone."""
    # Sampled even if colors are given, so that the random numbers after them are the same.
    if len(tones) == 1:
        sampled, lit = [int(rng.integers(len(LAMP_COLORS)))], [True]
    else:
        sampled = rng.permutation(len(LAMP_COLORS)).tolist()
        lit = (rng.random(len(tones)) >= _MISSING).tolist()
    colors = sampled if colors is None else colors
    if len({*colors} & {*range(len(LAMP_COLORS))}) != len(colors) or len(colors) != len(tones):
        raise ValueError(
            f"colors must be {len(tones)} different indices into {tuple(LAMP_COLORS)}: {colors}"
        )
    return {tone: color for tone, color, is_lit in zip(tones, colors, lit) if is_lit}


def _label(
    thing: Shape | Lamp, mask: np.ndarray, lamps: Sequence[Lamp], params: LampsParams
) -> Instance:
    """Return a shape or a lamp as an object; a lamp is its own cue."""
    cue = next((lamp for lamp in lamps if lamp.tone == thing.tone), None)
    color = cue.color if cue else len(LAMP_COLORS)
    if params.decided_by == "tone":
        of_shapes = len(TONES) * len(LAMP_COLORS)
        category = (len(TONES) * thing.color if isinstance(thing, Lamp) else of_shapes) + thing.tone
    else:
        category = thing.outline if params.decided_by == "outline" else color
    return Instance(category, thing.polygon, mask, cue.center if cue else None)


def _arrange(
    rng: np.random.Generator, params: LampsParams, num_lamps: int, height: int, width: int
) -> tuple[list[_Circle], list[_Circle]]:
    """Arrange lamps and shapes without overlap.

    Returns:
        The circles around the lamps, without their halos, and those around the shapes.
    """
    lamp_radii = rng.uniform(*params.lamp_size, size=num_lamps) / 2
    count = int(rng.integers(*params.num_shapes, endpoint=True))
    low, high = params.shape_size
    # Large ones first: they are the hardest to fit in.
    radii = np.sort(rng.uniform(low, high, size=count))[::-1] / 2
    for _ in range(200):
        # Each a radius and a distance from the border, which may cut a halo.
        wanted = [(params.halo * radius, 1.5 * radius) for radius in lamp_radii]
        wanted += [(radius, radius + params.gap) for radius in radii]
        circles: list[_Circle] = []
        for radius, margin in wanted:
            spot = _find_room(rng, circles, radius + params.gap, margin, height, width)
            if spot is None:
                break
            circles.append((*spot, radius))
        else:
            lamps = [(x, y, float(r)) for (x, y, _), r in zip(circles, lamp_radii)]
            return lamps, circles[num_lamps:]
        # Too crowded: retry with slightly smaller shapes.
        radii = np.maximum(radii * 0.95, low / 2)
    raise ValueError(f"found no room for {count} shapes in {width} x {height} pixels: {params}")


def _find_room(
    rng: np.random.Generator,
    taken: list[_Circle],
    distance: float,
    margin: float,
    height: int,
    width: int,
) -> tuple[float, float] | None:
    """Return a random point at least ``distance`` from all circles and ``margin`` from the border.

    None if it is not found.
    """
    if 2 * margin > min(height, width):
        return None
    for _ in range(30):
        x, y = _random_point(rng, height, width, margin)
        if all(math.hypot(x - u, y - v) >= distance + r for u, v, r in taken):
            return x, y
    return None


def _random_point(
    rng: np.random.Generator, height: int, width: int, margin: float
) -> tuple[float, float]:
    return float(rng.uniform(margin, width - margin)), float(rng.uniform(margin, height - margin))


def _sample_shapes(
    rng: np.random.Generator, circles: list[_Circle], tones: Sequence[int | None]
) -> list[Shape]:
    """Sample outline and tone, or else any color, of a shape in each circle."""
    colors = rng.permutation(len(PASTELS))
    shapes = []
    for i, (x, y, radius) in enumerate(circles):
        kind = int(rng.integers(len(_UNIT_POLYGONS)))
        polygon = _turn(rng, _UNIT_POLYGONS[kind]) * radius + (x, y)
        outline = kind % len(CATEGORIES["outline"])
        # One tone, which is None, takes no random number.
        tone = tones[0] if len(tones) == 1 else tones[int(rng.integers(len(tones)))]
        color = PASTELS[colors[i % len(colors)]] if tone is None else tuple(TONES.values())[tone]
        shapes.append(make_shape(outline, polygon, color, tone))
    return shapes


def _turn(rng: np.random.Generator, polygon: np.ndarray) -> np.ndarray:
    """Rotate a polygon (V, 2) around the origin by a random angle."""
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    return polygon @ np.array([[cos, sin], [-sin, cos]])


def _lamp_mask(lamp: Lamp, height: int, width: int) -> np.ndarray:
    """Return the boolean mask (H, W) of a lamp without its halo."""
    return signed_distance(*pixel_centers(0, 0, width, height), lamp.polygon) < 0


# Alternately round, pointed and square.
_UNIT_POLYGONS = (
    DISK,
    rounded(regular(3), 0.14),
    rounded(regular(4), 0.12),
    rounded(regular(6), 0.12),
    rounded(star(5, 0.5), 0.12),
    rounded(cross(0.36), 0.12),
)
