"""Table and plot of our blocks beside those of other packages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..utils.file_io import atomic_write
from ..utils.markdown import markdown_table
from ..utils.plotting import save_figure
from .peers import NOT_COMPARABLE, PEERS
from .report import MIB, Row

PEER_FILES = ("peers.json", "peers.md", "peers.png")
COLUMNS = (
    *("other block", "case", "ours, ms", "other, ms", "time ratio"),
    *("ours, MiB", "other, MiB", "memory ratio", "largest difference"),
)
PANELS = (("seconds_ratio", "time"), ("bytes_ratio", "peak memory"))


def peer_table(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """Markdown: a table of the cases measured, then the others with the reason for each.

    Args:
        rows: Results of `measure_peer`.
        versions: First result of `import_peers`.
    """
    timed = [_cells(row, versions) for row in rows if "not_timed" not in row]
    table = markdown_table(COLUMNS, timed) if timed else ""
    reasons = [
        f"- {_label(row, versions)}, {row['name']}: not timed, {row['not_timed']}."
        for row in rows
        if "not_timed" in row
    ]
    packages = {PEERS[name].package for name in versions}
    reasons += [
        f"- {name}: not comparable, {reason}."
        for name, reason in NOT_COMPARABLE.items()
        if name.split()[0] in packages
    ]
    return "\n".join([table, *reasons]).strip()


def _cells(row: Row, versions: Mapping[str, str]) -> list[str]:
    seconds, peaks = (
        [row[f"{form}_{key}"] for form in ("fast", "peer")] for key in ("seconds", "bytes")
    )
    return [
        _label(row, versions),
        row["name"],
        *(f"{1e3 * value:.3g}" for value in seconds),
        _spread(row.get("seconds_ratio")),
        *(f"{value / MIB:.3g}" for value in peaks),
        _spread(row.get("bytes_ratio")),
        f"{row['difference']:.1e}",
    ]


def _label(row: Row, versions: Mapping[str, str]) -> str:
    """Package, version and name of the other block."""
    peer = PEERS[row["case"]["peer"]]
    return f"{peer.package} {versions[peer.name]} {peer.block}"


def _spread(ratio: Optional[Mapping[str, float]]) -> str:
    """The median of a ratio with its range, or a dash."""
    if ratio is None:
        return "-"
    return f"{ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g})"


def peer_plot(rows: Sequence[Row], versions: Mapping[str, str]) -> Figure:
    """Ratios of time and of peak memory, one line for each case, one color for each other block."""
    timed = [row for row in rows if "not_timed" not in row]
    labels = list(dict.fromkeys(_label(row, versions) for row in timed))
    figure = Figure(figsize=(12, 2 + 0.17 * len(timed)), layout="constrained")
    for axes, (key, quantity) in zip(figure.subplots(1, 2, sharey=True), PANELS):
        for i, label in enumerate(labels):
            points = [
                (position, row[key])
                for position, row in enumerate(timed)
                if _label(row, versions) == label and key in row
            ]
            _draw_ratios(axes, points, f"C{i}", label)
        axes.axvline(1, color="0.3", linewidth=1)
        _set_ratio_axis(axes)
        axes.set_title(quantity)
        axes.set_yticks(range(len(timed)), [row["name"] for row in timed], fontsize=8)
        axes.set_ylim(max(len(timed), 1) - 0.5, -0.5)  # the first case on top
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw_ratios(axes: Axes, points: Sequence[tuple[int, Any]], color: str, label: str) -> None:
    """Medians as dots, with lines from the smallest to the largest ratio."""
    medians = [ratio["median"] for _, ratio in points]
    below = [ratio["median"] - ratio["min"] for _, ratio in points]
    above = [ratio["max"] - ratio["median"] for _, ratio in points]
    positions = [position for position, _ in points]
    axes.errorbar(medians, positions, xerr=[below, above], fmt="o", color=color, label=label)


def _set_ratio_axis(axes: Axes) -> None:
    """A logarithmic axis of plain numbers, at least from 0.5 to 2."""
    axes.set(xscale="log", xlabel="ours / other; left of 1, ours takes less")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)


def write_peers(
    folder: str, machine: Mapping[str, Any], rows: list[Row], versions: Mapping[str, str]
) -> None:
    """Write the `PEER_FILES` into an existing folder."""
    data, table, plot = (os.path.join(folder, name) for name in PEER_FILES)
    with atomic_write(data) as file:
        json.dump({"machine": machine, "versions": versions, "rows": rows}, file, indent=2)
    with atomic_write(table) as file:
        file.write(f"{peer_table(rows, versions)}\n")
    save_figure(peer_plot(rows, versions), plot)
