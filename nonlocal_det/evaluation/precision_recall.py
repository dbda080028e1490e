"""Precision-recall curves, per class and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_FEW = matplotlib.colormaps["tab10"].colors
_ENDS = 4  # with many classes, number of best and of worst classes that are colored
_FAINT = "#c8ccd4"
_BEST = ("#08306b", "#2171b5", "#4292c6", "#9ecae1")
_WORST = ("#7f2704", "#d94801", "#f16913", "#fdae6b")
# A dollar sign in the name of a class begins no formula.
_STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "text.parse_math": False}


def precision_recall_figure(names: Sequence[str], precision: np.ndarray, params: Any) -> Figure:
    """Plot three panels: at IoU .50, at .75, and the mean over .50, .55, ... .95.

    Args:
        names: Names of the classes.
        precision: Precision (IoUs, recalls, classes) from 0 to 1; -1 for a class without objects.
        params: Parameters of COCOeval: ``iouThrs``, ``recThrs`` and ``iouType``.
    """
    # Whether a class has objects does not depend on the IoU.
    has_objects = precision[0, 0] > -1
    names = [name for name, has in zip(names, has_objects) if has]
    precision = precision[:, :, has_objects]
    measure = "OKS" if params.iouType == "keypoints" else "IoU"
    panels = {
        f"{measure} = .50": precision[np.isclose(params.iouThrs, 0.5)].mean(axis=0),
        f"{measure} = .75": precision[np.isclose(params.iouThrs, 0.75)].mean(axis=0),
        f"{measure} = .50 to .95": precision.mean(axis=0),
    }
    ap = precision.mean(axis=(0, 1))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.2), dpi=150, layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (title, curves) in zip(axes, panels.items()):
            _draw_panel(axis, title, params.recThrs, curves, _class_colors(ap))
        axes[0].set_ylabel(f"precision ({params.iouType})")
        _add_legend(figure, axes[-1], names, ap)
    return figure


def _class_colors(ap: np.ndarray) -> dict[int, str]:
    """Return the color of each class that has one, by class index, from best to worst AP."""
    order = [int(k) for k in np.argsort(-ap, kind="stable")]
    if len(order) <= len(_FEW):
        return {k: _FEW[k] for k in order}
    ends = min(_ENDS, len(order) // 2)
    best, worst = order[:ends], order[-ends:]
    return dict(zip([*best, *worst], [*_BEST[:ends], *_WORST[::-1][-ends:]]))


def _draw_panel(
    axis: Axes, title: str, recalls: np.ndarray, curves: np.ndarray, colors: dict[int, str]
) -> None:
    """Plot the curves (recalls, classes) of one panel."""
    for k in range(curves.shape[1]):
        if k not in colors:
            axis.plot(recalls, curves[:, k], color=_FAINT, linewidth=0.6)
    for k, color in colors.items():
        axis.plot(recalls, curves[:, k], color=color, linewidth=1.2, gid=str(k))
    if curves.shape[1] > 1:
        axis.plot(recalls, curves.mean(axis=1), color="black", linewidth=2.2, gid="mean")
    if curves.size:
        title = f"{title}:  AP {100 * curves.mean():.1f}"
    axis.set(title=title, xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(color="#e8eaee", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Figure, axis: Axes, names: Sequence[str], ap: np.ndarray) -> None:
    """Add a legend with AP, from the best class to the worst; ``axis`` is any of the panels."""
    lines = {line.get_gid(): line for line in axis.lines}
    entries = []
    if "mean" in lines:
        entries.append((lines["mean"], f"mean  {100 * ap.mean():.1f}"))
    colors = _class_colors(ap)
    for rank, k in enumerate(colors):
        if len(colors) < len(names) and 2 * rank == len(colors):
            rest = next(line for line in axis.lines if line.get_color() == _FAINT)
            entries.append((rest, f"{len(names) - len(colors)} others"))
        entries.append((lines[str(k)], f"{names[k]}  {100 * ap[k]:.1f}"))
    if entries:
        handles, labels = zip(*entries)
        figure.legend(handles, labels, loc="outside right center", frameon=False, title="AP")
