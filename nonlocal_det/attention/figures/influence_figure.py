"""Figures of what a block attends to beside what has influence through it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ...utils.plotting import FIGURE_STYLE
from ..recording.query import AttentionQuery, query_rows
from ..recording.recorder import AttentionRecorder
from .attention_figure import attention_panel
from .layout import FigureLayout, is_wide
from .overlay import is_signed, max_magnitude

NUM_CELLS = 96  # of a map of influence, about; each costs a run of what is after the block


def grid_of(width: int, height: int, num_cells: int = NUM_CELLS) -> tuple[int, int]:
    """Rows and columns of about as many, nearly square, cells over an image."""
    rows = max(round(math.sqrt(num_cells * height / width)), 1)
    return rows, max(round(num_cells / rows), 1)


def influence_figure(
    image: np.ndarray,
    queries: list[AttentionQuery],
    recorder: AttentionRecorder,
    losses: np.ndarray,
    *,
    overview: np.ndarray,
    block: str,
    num_arrows: int = 10,
) -> Figure:
    """Draw for each detection its attention map, and the influence of the cells of a grid.

    Influence is what the logit of the class loses without the cell, relative to the largest
    magnitude, which is written above the map; gains have a second color. A cell may have little
    influence although its surroundings have much: what is known from several cells is not lost with
    one of them.

    Args:
        image: RGB uint8 image (H, W, 3), the original image.
        queries: The detections.
        recorder: Recorder that holds a call for the image alone.
        losses: What the logit of each detection's class loses without each cell of a grid over the
            image, (Q, R, C), as ``Influence.map(R, C).logit``.
        overview: RGB uint8 image of any size, drawn large.
        block: Name of the block, one that is not in a head.
        num_arrows: Maximum number of arrows in a panel of attention.

    Returns:
        matplotlib figure, to be saved with `nonlocal_det.attention.save_figure`.
    """
    height, width = image.shape[:2]
    wide = is_wide(width / height)
    count = len(queries)
    columns, rows = (2 if count else 0, max(count, 1)) if wide else (count, 2)
    layout = FigureLayout(width / height, columns, rows)
    signs = set()
    with matplotlib.rc_context(FIGURE_STYLE):
        layout.add_overview(overview, "detections" if queries else "no detection")
        for i, (weights, grid) in enumerate(query_rows(recorder, block, queries)):
            attended = grid.to_image(weights[None], width, height)[0]
            lost = _to_image(losses[i], width, height)
            numbers = (2 * i, 2 * i + 1) if wide else (i, i + count)
            top_keys = grid.top_k(weights, num_arrows)
            _add_panel(layout, numbers[0], image, queries[i], attended, "attention", top_keys)
            _add_panel(layout, numbers[1], image, queries[i], lost, "influence")
            signs |= {is_signed(attended), is_signed(lost)}
        layout.add_color_bars(signs, "weight or loss / max")
    return layout.figure


def _add_panel(
    layout: FigureLayout,
    number: int,
    image: np.ndarray,
    query: AttentionQuery,
    values: np.ndarray,
    kind: str,
    top_keys: Sequence[tuple[float, float, float]] = (),
) -> None:
    """Draw a map of values (H, W) as a panel of the figure."""
    panel = attention_panel(image, values, query, top_keys, target_length=layout.panel_length)
    layout.add_panel(number, panel, f"{query.label}: {kind}", max_magnitude(values))


def _to_image(cells: np.ndarray, width: int, height: int) -> np.ndarray:
    """Spread the values of cells (rows, columns) over the pixels of an image; they stay visible."""
    rows = np.arange(height) * cells.shape[0] // height
    columns = np.arange(width) * cells.shape[1] // width
    return cells[np.ix_(rows, columns)].astype(np.float32)
