"""Saving matplotlib figures, without matplotlib's global state."""

from __future__ import annotations

import os

import matplotlib
from matplotlib.axis import Tick
from matplotlib.figure import Figure
from matplotlib.text import Text

from .file_io import atomic_write

FIGURE_STYLE = {"font.family": "DejaVu Sans", "font.size": 7.5, "pdf.fonttype": 42}


def save_figure(figure: Figure, path: str) -> None:
    """Save a figure, completely or not at all, and create its folder.

    Dollar signs in its texts, as in names of classes, are literal.

    Args:
        figure: Figure to save.
        path: Output file, whose extension sets the format, for instance .png or .pdf.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    _show_dollars(figure)
    with matplotlib.rc_context(FIGURE_STYLE), atomic_write(path, "wb") as file:
        figure.savefig(file, format=os.path.splitext(path)[1][1:])


def _show_dollars(figure: Figure) -> None:
    """Take the texts of a figure for what they are, not for formulas between dollar signs."""
    # Numbers are excepted: those of logarithmic axes are formulas.
    numbers = {text for tick in figure.findobj(Tick) for text in tick.findobj(Text)}
    for text in set(figure.findobj(Text)) - numbers:
        text.set_parse_math(False)
