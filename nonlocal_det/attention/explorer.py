"""One self-contained page per picture, to move over and see what each point looks at.

Everything is in the file: the picture, and for each block the maps of a grid of points, coarse
enough for the file to stay below 8 MB. What is left out is written on the page:

- Points: the block's cells, or every second, third, ... in each direction; a group of cells shows
  the map of the one in its middle, which is exact.
- Maps: the block's keys, or the means of groups of 2 x 2, 3 x 3, ... of them.
- Weights: eight bits on a logarithmic scale over four decades below the largest of each map; what
  is smaller counts as zero. The relative error is at most 2%, or 4% with signs.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import zlib
from collections.abc import Sequence
from typing import Any, Optional

import matplotlib
import numpy as np
from PIL import Image

from .figure import AttentionQuery
from .geometry import Grid
from .overlay import DIVERGING, SEQUENTIAL, check_image
from .recorder import AttentionRecorder

MAX_BYTES = 8_000_000
DECADES = 4
COLORMAPS = (SEQUENTIAL, "viridis", "turbo", "gray", DIVERGING, "PuOr_r")

_TEMPLATE = os.path.join(os.path.dirname(__file__), "explorer.html")
_LONGEST = 1600  # pixels of the longer side of the picture on the page
_BLOCK_BYTES = 2_000_000  # of the codes of one block, before compression
_CHUNK = 256  # rows computed at a time


def explorer_page(
    image: np.ndarray,
    looks: Sequence[AttentionQuery],
    recorder: AttentionRecorder,
    *,
    title: str,
    blocks: Optional[Sequence[str]] = None,
    index: int = 0,
) -> str:
    """The page, as HTML.

    Args:
        image: RGB uint8 (H, W, 3), the original picture.
        looks: detections or points to choose from; a block in a head is shown inside their boxes.
        recorder: holds the call.
        title: of the page.
        blocks: names; by default all that the call reached.
        index: of the picture in the recorded batch.

    Raises:
        KeyError: for a block that the call did not reach.
    """
    check_image(image)
    picture = _picture_url(image)
    names = recorder.recorded if blocks is None else list(blocks)
    room = (0.97 * MAX_BYTES - len(picture)) * 3 / 4 - 60_000
    budget = min(room / max(len(names), 1), _BLOCK_BYTES)
    content = {
        "title": title,
        "width": image.shape[1],
        "height": image.shape[0],
        "picture": picture,
        "decades": DECADES,
        "looks": [{"point": look.point, "label": look.label, "box": look.box} for look in looks],
        "colormaps": {name: _base64(_colors(name)) for name in COLORMAPS},
        "blocks": [_block(recorder, name, looks, index, budget) for name in names],
    }
    with open(_TEMPLATE, encoding="utf-8") as file:
        page = file.read()
    # Neither a title nor a label may end the script that holds them.
    data = json.dumps(content).replace("<", "\\u003c")
    return page.replace("__TITLE__", html.escape(title)).replace("__DATA__", data)


def _picture_url(image: np.ndarray) -> str:
    """The picture as a data URL: PNG where that is small, as for drawings, or else JPEG."""
    picture = Image.fromarray(image)
    picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        if file.tell() < 200_000:
            break
    return f"data:image/{kind};base64,{_base64(file.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _colors(name: str) -> bytes:
    """256 RGB colors of matplotlib's."""
    colors = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return (colors * 255 + 0.5).astype(np.uint8).tobytes()


def _block(
    recorder: AttentionRecorder,
    name: str,
    looks: Sequence[AttentionQuery],
    index: int,
    budget: float,
) -> dict[str, Any]:
    """A block's views: one of the whole picture, or in a head one for each detection."""
    in_head = recorder.regions(name, image=index) is not None
    # For each view the index of its look, and of its region.
    shown: list[tuple[int, Optional[int]]] = [(-1, None)]
    if in_head:
        boxed = [(i, look) for i, look in enumerate(looks) if look.box is not None]
        shown = [(i, recorder.region(name, k.point, image=index, box=k.box)) for i, k in boxed]
    views = [_view(recorder, name, index, r, budget / len(shown)) for _, r in shown]
    # All views of a block are coded alike, so that one scale serves them.
    signed = any((values < 0).any() for _, _, values, _ in views)
    coded = [{"look": i, **_coded(*view, signed)} for (i, _), view in zip(shown, views)]
    return {"name": name, "signed": bool(signed), "inHead": in_head, "views": coded}


def _view(
    recorder: AttentionRecorder, name: str, index: int, region: Optional[int], budget: float
) -> tuple[Grid, Grid, np.ndarray, tuple[int, int]]:
    """The grids of points and keys, the weights (Q, R, C), and the groups of cells."""
    grid = recorder.grid(name, image=index, region=region)
    first = np.zeros((1, 2), dtype=np.int64)
    keys = recorder.weights(name, first, image=index, region=region)[1]
    point_step, key_step = _steps(grid, keys, budget)
    cells = _middle_cells(grid, point_step)
    chunks = []
    for start in range(0, len(cells), _CHUNK):
        chunk = cells[start : start + _CHUNK]
        values, _ = recorder.weights(name, chunk, image=index, region=region)
        chunks.append(_means(values, key_step))
    steps = (point_step, key_step)
    return grid.coarser(point_step), keys.coarser(key_step), np.concatenate(chunks), steps


def _steps(grid: Grid, keys: Grid, budget: float) -> tuple[int, int]:
    """How many cells, and keys, stand for one, so that all maps take at most ``budget`` bytes."""

    def size(steps: tuple[int, int]) -> int:
        points, targets = grid.coarser(steps[0]), keys.coarser(steps[1])
        return points.columns * points.rows * targets.columns * targets.rows

    most = max(grid.columns, grid.rows)
    pairs = [(p, k) for p in range(1, most + 1) for k in (p, max(p - 1, 1))]
    # Points before keys: the eye misses detail of the map more than of where it asks.
    pairs.sort(key=lambda pair: (sum(pair), pair[1]))
    return next((pair for pair in pairs if size(pair) <= budget), pairs[-1])


def _middle_cells(grid: Grid, step: int) -> np.ndarray:
    """(Q, 2) as (column, row): the middle of each group of ``step`` x ``step`` cells."""
    coarse = grid.coarser(step)
    columns = np.minimum(np.arange(coarse.columns) * step + step // 2, grid.columns - 1)
    rows = np.minimum(np.arange(coarse.rows) * step + step // 2, grid.rows - 1)
    return np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)


def _means(values: np.ndarray, step: int) -> np.ndarray:
    """Means (Q, R / step, C / step) of groups of keys (Q, R, C); at the border of what there is."""
    for axis in (1, 2):
        length = values.shape[axis]
        starts = np.arange(0, length, step)
        counts = np.diff([*starts, length]).reshape([-1 if a == axis else 1 for a in range(3)])
        values = np.add.reduceat(values, starts, axis=axis) / counts
    return values


def _coded(
    points: Grid, keys: Grid, values: np.ndarray, steps: tuple[int, int], signed: bool
) -> dict[str, Any]:
    largest, codes = encode(values.reshape(len(values), -1), signed)
    return {
        "points": _grid(points),
        "keys": _grid(keys),
        "bounds": points.bounds,
        "steps": steps,
        "largest": _base64(largest.astype("<f4").tobytes()),
        "codes": _base64(zlib.compress(codes.tobytes(), 9)),
    }


def _grid(grid: Grid) -> dict[str, float]:
    return {
        "left": grid.left,
        "top": grid.top,
        "cellWidth": grid.cell_width,
        "cellHeight": grid.cell_height,
        "columns": grid.columns,
        "rows": grid.rows,
    }


def encode(values: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights (Q, M) as the largest magnitude of each row, (Q,), and a byte for each weight.

    0 is zero. Above it the scale is logarithmic: 1 is ``DECADES`` below the largest, and 255 the
    largest; or, if ``signed``, 127 the largest, and the eighth bit the sign.
    """
    largest = np.abs(values).max(axis=1)
    top = 127 if signed else 255
    share = np.abs(values) / np.where(largest > 0, largest, 1)[:, None]
    with np.errstate(divide="ignore"):
        place = 1 + np.log10(share) / DECADES
    codes = np.where(place >= 0, np.rint(1 + place * (top - 1)), 0).astype(np.uint8)
    return largest, codes | np.where(values < 0, 128, 0).astype(np.uint8) if signed else codes
