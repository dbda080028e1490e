"""Validation of masks in COCO's formats: polygons, and run-length encodings (RLE).

COCO's decoder, in C, checks neither: what is not valid can end a run, or take all memory.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from .coco_entries import Entry, is_finite_list

# Rasterizing a polygon takes memory in proportion to its outline; this many image sides are enough.
_MAX_SIDES = 3


def is_polygon(polygon: Any, image: Optional[Entry]) -> bool:
    """Whether a polygon is a list x, y, x, y, ... of 3 points or more, none far from the image.

    Args:
        polygon: Value to check.
        image: Its image, if known.
    """
    if not is_finite_list(polygon) or len(polygon) < 6 or len(polygon) % 2:
        return False
    limit = _MAX_SIDES * max(image["width"], image["height"]) if image else float("inf")
    return -limit <= min(polygon) and max(polygon) <= limit


def is_rle(mask: Any, image: Optional[Entry]) -> bool:
    """Whether a mask is a run-length encoding of the image's size, as far as that is known.

    Args:
        mask: Value to check, of which "counts" is a list or COCO's compressed string.
        image: Its image, if known.
    """
    if not isinstance(mask, dict):
        return False
    size, counts = mask.get("size"), mask.get("counts")
    if not is_finite_list(size) or len(size) != 2:
        return False
    if image is not None and list(size) != [image["height"], image["width"]]:
        return False
    if isinstance(counts, str):
        runs = decompress_counts(counts)
        return bool(runs.size and runs.min() >= 0 and runs.sum() == size[0] * size[1])
    if not isinstance(counts, list) or not all(type(c) is int and c >= 0 for c in counts):
        return False
    return sum(counts) == size[0] * size[1]


def decompress_counts(text: str) -> np.ndarray:
    """Decode the compressed counts of an RLE.

    Each character holds 5 bits of a number, least significant first, and a sixth that says whether
    more follow; from the fourth on, a number is the difference to the last but one.

    Args:
        text: COCO's compressed string.

    Returns:
        The counts; none if the string is no sequence of such numbers.
    """
    none = np.zeros(0, dtype=np.int64)
    digits = (
        np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    )
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return none
    ends = np.flatnonzero(digits & 32 == 0)
    lengths = np.diff(ends, prepend=-1)
    starts = ends - lengths + 1
    if lengths.max() > 10:  # beyond 50 bits, and any image
        return none
    shifts = 5 * (np.arange(digits.size) - np.repeat(starts, lengths))
    counts = np.add.reduceat((digits & 31) << shifts, starts)
    counts -= ((digits[ends] & 16) >> 4) << (5 * lengths)  # the highest bit is the sign
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts
