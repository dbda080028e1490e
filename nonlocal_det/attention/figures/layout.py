"""Layout of attention figures: an overview image, a grid of panels, color bars.

Lengths are in inches, y pointing down from the top left corner, unless named otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .overlay import DIVERGING, SEQUENTIAL

_PANEL = 1.3  # shorter side of a panel, unless that makes its width exceed _MAX_PANEL_WIDTH
_MAX_PANEL_WIDTH = 3.9
_STACKED_WIDTH = 7.6  # of the overview of a wide image
_GAP = 0.12
_TITLE = 0.24
_COLOR_BAR = 0.09
_DPI = 200


def grid_shape(num_queries: int, num_blocks: int, aspect: float) -> tuple[int, int]:
    """Choose the number of columns and rows of the grid of panels.

    Several blocks get a row each. The panels of a single block fill up to three rows, or two
    columns if their image is very wide.

    Args:
        num_queries: Number of queries.
        num_blocks: Number of blocks.
        aspect: Width of the image over its height.

    Returns:
        (columns, rows).
    """
    if num_queries == 0 or num_blocks == 0:
        return 0, 1
    if num_blocks > 1:
        return num_queries, num_blocks
    if is_wide(aspect):
        columns = min(num_queries, 2)
        return columns, -(-num_queries // columns)
    rows = 1 if num_queries < 2 else 2 if num_queries <= 8 else 3
    return -(-num_queries // rows), rows


def is_wide(aspect: float) -> bool:
    """Whether an image is so wide that panels go below the overview."""
    return aspect * _PANEL > _MAX_PANEL_WIDTH


class FigureLayout:
    """A figure with an overview on the left, panels in the middle, and color bars on the right.

    The overview is at most as high as two rows of panels; that of a wide image is above them.

    Args:
        aspect: Width of every image over its height.
        columns: Number of columns of panels.
        rows: Number of rows of panels.
    """

    def __init__(self, aspect: float, columns: int, rows: int) -> None:
        self._columns = columns
        if is_wide(aspect):
            self._panel_width = (_STACKED_WIDTH + _GAP) / min(max(columns, 1), 2) - _GAP
        else:
            self._panel_width = min(_PANEL * max(aspect, 1.0), _MAX_PANEL_WIDTH)
        self._panel_height = self._panel_width / aspect
        panels_height = rows * (self._panel_height + _TITLE) + (rows - 1) * _GAP / 2
        panels_width = columns * (self._panel_width + _GAP)
        if is_wide(aspect):
            self._overview_width = _STACKED_WIDTH
            self._overview_height = self._overview_width / aspect
            self._left, self._top = 2 * _GAP, _TITLE + self._overview_height + _GAP / 2
            panels_width = max(panels_width, _STACKED_WIDTH + _GAP)
        else:
            room = max(panels_height - _TITLE, self._panel_height)
            self._overview_height = min(room, 2 * self._panel_height + _TITLE)
            self._overview_width = self._overview_height * aspect
            self._left, self._top = self._overview_width + 3 * _GAP, 0.0
        self._height = self._top + (panels_height if columns or not self._top else 0)
        self._bars_height = max(self._height - _TITLE, self._panel_height)
        self._width = self._left + panels_width + 0.65
        self.figure = Figure(figsize=(self._width, self._height + _GAP), dpi=_DPI)

    @property
    def panel_length(self) -> int:
        """Length of the longer side of a panel in pixels of the figure."""
        return round(max(self._panel_width, self._panel_height) * _DPI)

    def _axes(self, x: float, y: float, width: float, height: float) -> Axes:
        total = self._height + _GAP
        box = (x / self._width, 1 - (y + height) / total, width / self._width, height / total)
        return self.figure.add_axes(box)

    def _show(self, axes: Axes, image: np.ndarray, title: str) -> None:
        axes.imshow(image, aspect="auto", interpolation="antialiased")
        axes.set_axis_off()
        axes.set_title(title, loc="left", pad=3, fontsize=7.5)

    def _row_top(self, row: int) -> float:
        return self._top + _TITLE + row * (self._panel_height + _TITLE + _GAP / 2)

    def add_overview(self, image: np.ndarray, title: str) -> None:
        """Show the overview image, RGB uint8."""
        x = self._left if self._top else _GAP
        box = (x, _TITLE, self._overview_width, self._overview_height)
        self._show(self._axes(*box), image, title)

    def add_panel(self, number: int, image: np.ndarray, title: str, vmax: float) -> None:
        """Show a panel.

        Args:
            number: Number of the panel, counted from 0 row by row.
            image: RGB uint8 image.
            title: Title of the panel.
            vmax: Largest magnitude in the panel's attention map, written above it.
        """
        row, column = divmod(number, self._columns)
        x = self._left + column * (self._panel_width + _GAP)
        axes = self._axes(x, self._row_top(row), self._panel_width, self._panel_height)
        self._show(axes, image, title)
        axes.set_title(f"max {vmax:.2g}", loc="right", pad=3, fontsize=6, color="0.45")

    def add_row_names(self, names: Sequence[str]) -> None:
        """Write a name beside each row of panels."""
        for row, name in enumerate(names):
            x, y = self._left - 0.7 * _GAP, self._row_top(row) + self._panel_height / 2
            position = x / self._width, 1 - y / (self._height + _GAP)
            self.figure.text(
                *position, name, rotation=90, ha="right", va="center", fontsize=6, color="0.45"
            )

    def add_color_bars(self, signs: set[bool], label: str = "weight / max") -> None:
        """Add a color bar for each kind of attention map in the figure.

        Args:
            signs: Whether a map is signed, for each kind of map.
            label: What the bars show.
        """
        height = (self._bars_height - 2 * _GAP * (len(signs) - 1)) / max(len(signs), 1)
        for number, signed in enumerate(sorted(signs)):
            y = _TITLE + number * (height + 2 * _GAP)
            axes = self._axes(self._width - 0.62, y, _COLOR_BAR, height)
            scale = Normalize(-1 if signed else 0, 1)
            colors = ScalarMappable(scale, DIVERGING if signed else SEQUENTIAL)
            ticks = [-1, 0, 1] if signed else [0, 0.5, 1]
            bar = self.figure.colorbar(colors, cax=axes, ticks=ticks)
            bar.set_label(label, fontsize=6, labelpad=2)
            bar.outline.set_visible(False)
            axes.tick_params(length=2, width=0.5, labelsize=6, pad=2)
