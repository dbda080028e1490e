"""A self-contained HTML page for each image that shows the attention map under the pointer.

The file holds the image and, for each block, the attention maps of a grid of queries, downsampled
so that the file stays below `MAX_BYTES`. The page states what was omitted:

- Queries: the cells of the block, or every second, third, ... one in each direction; a group of
  cells shows the exact map of the cell in its middle.
- Keys: the cells of the block's keys, or the means of groups of 2 x 2, 3 x 3, ... cells.
- Weights: eight bits on a logarithmic scale over four decades below the maximum of each map;
  smaller weights become zero. The relative error is at most 2%, or 4% for signed weights.

Shape symbols: Q queries, M keys, R and C rows and columns of the grid of keys.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import matplotlib
import numpy as np
from PIL import Image

from ...utils.deprecation import renamed_arguments
from ..recording.geometry import Grid
from ..recording.query import AttentionQuery
from ..recording.recorder import AttentionRecorder
from .overlay import DIVERGING, SEQUENTIAL, check_image

MAX_BYTES = 8_000_000
DECADES = 4
COLORMAPS = (SEQUENTIAL, "viridis", "turbo", "gray", DIVERGING, "PuOr_r")

_TEMPLATE = os.path.join(os.path.dirname(__file__), "explorer.html")
_MAX_IMAGE_LENGTH = 1600  # pixels of the longer side of the embedded image
_MAX_BLOCK_BYTES = 2_000_000  # codes of one block, before compression
_CHUNK = 256  # rows computed at a time


@renamed_arguments(looks="queries", index="image_index")
def explorer_page(
    image: np.ndarray,
    queries: Sequence[AttentionQuery],
    recorder: AttentionRecorder,
    *,
    title: str,
    blocks: Optional[Sequence[str]] = None,
    image_index: int = 0,
    influence: Optional[Mapping[str, np.ndarray]] = None,
) -> str:
    """Create the page of an image.

    Args:
        image: RGB uint8 image (H, W, 3), the original image.
        queries: Detections or points to choose from; a block in a head is shown inside their
            boxes.
        recorder: Recorder that holds the call.
        title: Title of the page.
        blocks: Names of the blocks to include. Default: all recorded blocks.
        image_index: Index of the image in the batch.
        influence: By name of a block, what the logit of each query's class loses without each cell
            of a grid over the image, float (Q, R, C), as ``Influence.map(R, C).logit``.

    Returns:
        HTML.

    Raises:
        KeyError: If a block was not recorded.
        ValueError: If ``image`` is not RGB uint8.
    """
    check_image(image)
    image_url = _image_url(image)
    names = recorder.recorded_blocks if blocks is None else list(blocks)
    # Base64 needs four bytes for three; the rest of the page, colormaps included, is below 60 kB.
    available = (0.97 * MAX_BYTES - len(image_url)) * 3 / 4 - 60_000
    max_bytes = min(available / max(len(names), 1), _MAX_BLOCK_BYTES)
    content = {
        "title": title,
        "width": image.shape[1],
        "height": image.shape[0],
        "image": image_url,
        "decades": DECADES,
        "queries": [{"point": q.point, "label": q.label, "box": q.box} for q in queries],
        "colormaps": {name: _base64(_color_table(name)) for name in COLORMAPS},
        "blocks": [
            {
                **_block_data(recorder, name, queries, image_index, max_bytes),
                "influence": _influence_data((influence or {}).get(name), image),
            }
            for name in names
        ],
    }
    with open(_TEMPLATE, encoding="utf-8") as file:
        page = file.read()
    # A title or label must not close the script element that holds them.
    data = json.dumps(content).replace("<", "\\u003c")
    return page.replace("__TITLE__", html.escape(title)).replace("__DATA__", data)


def _image_url(image: np.ndarray) -> str:
    """The image as a data URL: PNG if that is small, as for drawings, or else JPEG."""
    resized = Image.fromarray(image)
    resized.thumbnail((_MAX_IMAGE_LENGTH, _MAX_IMAGE_LENGTH), Image.Resampling.LANCZOS)
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        resized.save(file, kind, **options)
        if file.tell() < 200_000:
            break
    return f"data:image/{kind};base64,{_base64(file.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _color_table(name: str) -> bytes:
    """256 RGB colors of a matplotlib colormap, one byte per channel."""
    colors = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return (colors * 255 + 0.5).astype(np.uint8).tobytes()


def _influence_data(losses: Optional[np.ndarray], image: np.ndarray) -> Optional[dict[str, Any]]:
    """The influence of the cells of a grid on each query, as the page reads a signed view."""
    if losses is None or not len(losses):
        return None
    rows, columns = losses.shape[1:]
    height, width = image.shape[:2]
    bounds = (0.0, 0.0, float(width), float(height))
    grid = Grid(0.0, 0.0, width / columns, height / rows, columns, rows, bounds)
    return _encoded(_View(grid, grid, losses, (1, 1)), signed=True)


@dataclass(frozen=True)
class _View:
    """The attention maps of a block over the whole image, or over one RoI.

    Attributes:
        queries: Grid of the queries, downsampled.
        keys: Grid of the keys, downsampled.
        weights: Attention weights (Q, R, C).
        factors: Downsampling factors of the queries and of the keys.
    """

    queries: Grid
    keys: Grid
    weights: np.ndarray
    factors: tuple[int, int]


def _block_data(
    recorder: AttentionRecorder,
    name: str,
    queries: Sequence[AttentionQuery],
    image_index: int,
    max_bytes: float,
) -> dict[str, Any]:
    """A block's views: one of the whole image, or one for each detection if it is in a head."""
    in_head = recorder.roi_boxes(name, image_index=image_index) is not None
    # The index of the query that each view belongs to, and of its RoI.
    indices: list[tuple[int, Optional[int]]] = [(-1, None)]
    if in_head:
        indices = [
            (i, recorder.roi_index(name, q.point, image_index=image_index, roi_box=q.box))
            for i, q in enumerate(queries)
            if q.box is not None
        ]
    views = [
        _view(recorder, name, image_index, roi_index, max_bytes / len(indices))
        for _, roi_index in indices
    ]
    # All views of a block are encoded alike, so that one scale serves them.
    signed = any((view.weights < 0).any() for view in views)
    encoded = [{"query": i, **_encoded(view, signed)} for (i, _), view in zip(indices, views)]
    return {"name": name, "signed": bool(signed), "inHead": in_head, "views": encoded}


def _view(
    recorder: AttentionRecorder,
    name: str,
    image_index: int,
    roi_index: Optional[int],
    max_bytes: float,
) -> _View:
    """Compute the attention maps of one view in at most ``max_bytes`` bytes."""
    at = {"image_index": image_index, "roi_index": roi_index}
    grid = recorder.grid(name, **at)
    _, keys = recorder.attention_weights(name, np.zeros((1, 2), dtype=np.int64), **at)
    query_factor, key_factor = _downsampling_factors(grid, keys, max_bytes)
    cells = _middle_cells(grid, query_factor)
    chunks = []
    for start in range(0, len(cells), _CHUNK):
        weights, _ = recorder.attention_weights(name, cells[start : start + _CHUNK], **at)
        chunks.append(_block_means(weights, key_factor))
    return _View(
        queries=grid.downsampled(query_factor),
        keys=keys.downsampled(key_factor),
        weights=np.concatenate(chunks),
        factors=(query_factor, key_factor),
    )


def _downsampling_factors(queries: Grid, keys: Grid, max_bytes: float) -> tuple[int, int]:
    """The smallest factors of queries and keys with which all maps take at most ``max_bytes``."""

    def size(factors: tuple[int, int]) -> int:
        small_queries, small_keys = queries.downsampled(factors[0]), keys.downsampled(factors[1])
        return small_queries.columns * small_queries.rows * small_keys.columns * small_keys.rows

    largest = max(queries.columns, queries.rows)
    pairs = [(q, k) for q in range(1, largest + 1) for k in (q, max(q - 1, 1))]
    # Queries are reduced before keys: detail of a map is missed more than that of its query.
    pairs.sort(key=lambda pair: (sum(pair), pair[1]))
    return next((pair for pair in pairs if size(pair) <= max_bytes), pairs[-1])


def _middle_cells(grid: Grid, factor: int) -> np.ndarray:
    """The cell (column, row) in the middle of each ``factor`` x ``factor`` group, shape (Q, 2)."""
    small = grid.downsampled(factor)
    columns = np.minimum(np.arange(small.columns) * factor + factor // 2, grid.columns - 1)
    rows = np.minimum(np.arange(small.rows) * factor + factor // 2, grid.rows - 1)
    return np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)


def _block_means(weights: np.ndarray, factor: int) -> np.ndarray:
    """Means over ``factor`` x ``factor`` keys of (Q, R, C), smaller groups at the border."""
    for axis in (1, 2):
        length = weights.shape[axis]
        starts = np.arange(0, length, factor)
        counts = np.diff([*starts, length]).reshape([-1 if a == axis else 1 for a in range(3)])
        weights = np.add.reduceat(weights, starts, axis=axis) / counts
    return weights


def _encoded(view: _View, signed: bool) -> dict[str, Any]:
    maxima, codes = encode(view.weights.reshape(len(view.weights), -1), signed)
    return {
        "queries": _grid_data(view.queries),
        "keys": _grid_data(view.keys),
        "bounds": view.queries.bounds,
        "factors": view.factors,
        "maxima": _base64(maxima.astype("<f4").tobytes()),
        "codes": _base64(zlib.compress(codes.tobytes(), 9)),
    }


def _grid_data(grid: Grid) -> dict[str, float]:
    return {
        "left": grid.left,
        "top": grid.top,
        "cellWidth": grid.cell_width,
        "cellHeight": grid.cell_height,
        "columns": grid.columns,
        "rows": grid.rows,
    }


def encode(weights: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Encode attention weights as bytes on a logarithmic scale.

    Code 0 is zero. Unsigned, code 1 is `DECADES` decades below the maximum of the row and code 255
    the maximum. Signed, code 127 is the maximum, and the eighth bit is the sign.

    Args:
        weights: Attention weights, shape (Q, M).
        signed: Whether to keep the sign.

    Returns:
        Maximum magnitude of each row, shape (Q,), and codes, uint8 of shape (Q, M).
    """
    maxima = np.abs(weights).max(axis=1)
    top = 127 if signed else 255
    relative = np.abs(weights) / np.where(maxima > 0, maxima, 1)[:, None]
    with np.errstate(divide="ignore"):
        level = 1 + np.log10(relative) / DECADES
    codes = np.where(level >= 0, np.rint(1 + level * (top - 1)), 0).astype(np.uint8)
    return maxima, codes | np.where(weights < 0, 128, 0).astype(np.uint8) if signed else codes
