"""Parameters of the images: their ranges, and the categories of the objects."""

from __future__ import annotations

from dataclasses import dataclass

from .paint import LAMP_COLORS, TONES

# The categories for each cue that can decide a shape's category.
CATEGORIES = {
    "lamp": tuple(LAMP_COLORS),
    "outline": ("round", "pointed", "square"),
    "lamp or unlit": (*LAMP_COLORS, "unlit"),
    "match": (*LAMP_COLORS, "unlit"),
    # Of lamps, by color, then by tone; of shapes.
    "tone": (*(f"{color} {tone}" for color in LAMP_COLORS for tone in TONES), *TONES),
}


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
            lamp; "lamp or unlit", for images of which a quarter has no lamp; "match" or "tone",
            for the same images with up to three lamps to match.
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
    def may_be_unlit(self) -> bool:
        """Whether a shape may have no lamp."""
        return self.to_match or self.decided_by == "lamp or unlit"

    @property
    def glow_radius(self) -> float:
        """Radius in pixels within which the light of any lamp ends."""
        return self.lamp_size[1] / 2 * self.halo

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories."""
        return CATEGORIES[self.decided_by]
