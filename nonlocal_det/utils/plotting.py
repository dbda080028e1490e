"""Saving matplotlib figures, without matplotlib's global state."""

from __future__ import annotations

import os

import matplotlib
from matplotlib.figure import Figure

FIGURE_STYLE = {"font.family": "DejaVu Sans", "font.size": 7.5, "pdf.fonttype": 42}


def save_figure(figure: Figure, path: str) -> None:
    """Save a figure, and create its folder.

    Args:
        figure: Figure to save.
        path: Output file, whose extension sets the format, for instance .png or .pdf.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with matplotlib.rc_context(FIGURE_STYLE):
        figure.savefig(path)
