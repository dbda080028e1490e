"""Random arrangement of circles, around lamps and shapes, in an image."""

from __future__ import annotations

import math

import numpy as np

from .params import LampsParams

Circle = tuple[float, float, float]  # x, y, radius


def arrange(
    rng: np.random.Generator, params: LampsParams, num_lamps: int, height: int, width: int
) -> tuple[list[Circle], list[Circle]]:
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
        circles: list[Circle] = []
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
    taken: list[Circle],
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
