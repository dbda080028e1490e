"""Generator of synthetic images in which an object's class depends on a cue far away from it.

Each image shows one glowing lamp and a few shapes. A shape's category is the lamp's color, and the
lamp sheds no light on the shapes: for a given seed, the pixels of every shape are the same under
all three lamps. So a detector can classify an object only from the lamp elsewhere in the image,
which is what non-local blocks are for. As a control, the same images can be labeled by a local cue,
the outline of each shape; then the lamp carries no information.

Where a lamp may be missing, every color has to be seen: none can be what is left if the two others
are not found.

One summary of the image, the same for all of its shapes, is enough there. The images to match need
one for each shape: the shapes of an image have three of four tones, most of which are the core of
a lamp, too, each of another color. A shape's category is the color of the lamp whose core has its
tone, or "unlit". The same images can be labeled by what is local in them: the tone of a shape, and
the color and tone of a lamp.

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

from .arrangement import Circle, arrange
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
from .params import CATEGORIES, LampsParams
from .raster import cross, pixel_centers, regular, rounded, signed_distance, star

# Shape symbols: H, W: height and width of the image in pixels. V: vertices of one polygon.

# Change this whenever the same seed and parameters would give other images or annotations.
GENERATOR_VERSION = 1

_MISSING = 0.25  # probability that an image, or a tone of one to match, has no lamp if it may


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
        lamps: Its lamps; exactly one, unless shapes may be unlit.
    """

    image: np.ndarray
    instances: list[Instance]
    lamps: list[Lamp]


def render_image(
    rng: np.random.Generator, params: LampsParams | None = None, *, color: int | None = None
) -> tuple[np.ndarray, list[Instance], Lamp]:
    """Render one image that has one lamp; see `render_scene` for others.

    Args:
        rng: Random number generator for everything that the parameters leave open.
        params: Parameters of the image; by default `LampsParams()`.
        color: Color of the lamp, an index into `LAMP_COLORS`; None samples it. For the same state
            of ``rng``, it changes the pixels of the lamp and its halo only.

    Returns:
        The image (H, W, 3), RGB uint8; its instances, whose masks are disjoint; its lamp.

    Raises:
        ValueError: If the color is not one of the lamp's, the shapes do not fit in the image, or
            the image may have another number of lamps.
    """
    params = params or LampsParams()
    if params.may_be_unlit:
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
    color_of = _sample_lamp_colors(rng, tones, colors, params.may_be_unlit)
    (low, high), (left, right) = params.side, params.width or params.side
    height, width = (int(side) for side in rng.integers((low, left), (high, right), endpoint=True))
    lamp_circles, shape_circles = arrange(rng, params, len(color_of), height, width)
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
    rng: np.random.Generator,
    tones: Sequence[int | None],
    colors: Sequence[int] | None,
    may_be_unlit: bool,
) -> dict[int | None, int]:
    """Sample the color of each lamp, by its tone."""
    # Sampled even if colors are given, so that the random numbers after them are the same.
    if len(tones) == 1:
        sampled = [int(rng.integers(len(LAMP_COLORS)))]
    else:
        sampled = rng.permutation(len(LAMP_COLORS)).tolist()
    lit = (rng.random(len(tones)) >= _MISSING).tolist() if may_be_unlit else [True] * len(tones)
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
    category = params.categories.index(_category(thing, cue, params.decided_by))
    return Instance(category, thing.polygon, mask, cue.center if cue else None)


def _category(thing: Shape | Lamp, cue: Lamp | None, decided_by: str) -> str:
    """Name of the category of a shape or a lamp."""
    color = tuple(LAMP_COLORS)[cue.color] if cue else "unlit"
    if decided_by == "outline":
        return CATEGORIES["outline"][thing.outline]
    if decided_by == "tone":
        tone = tuple(TONES)[thing.tone]
        return f"{color} {tone}" if isinstance(thing, Lamp) else tone
    return color


def _sample_shapes(
    rng: np.random.Generator, circles: list[Circle], tones: Sequence[int | None]
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
