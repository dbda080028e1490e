"""Plot of AP against the distance to the cue."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from .statistics import Results, values_by_seed, variants


def distance_plot(report: Mapping[str, Any], results: Results) -> Figure:
    """Plot one panel per task with one line per variant, through the mean AP at each range.

    Args:
        report: Content of report.json of a suite with distances. The dashed line is the limit of
            the baseline's receptive field.
        results: Results of the suite's runs. Each seed is a dot.
    """
    names = variants(results)
    tasks = list(dict.fromkeys(run["task"] for run in results))
    ranges = results[0]["by_distance"]
    middles = [(r["low"] + r["high"]) / 2 for r in ranges]
    figure = Figure(figsize=(5.2 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks):
        of_task = [run for run in results if run["task"] == task]
        for variant in variants(of_task):
            by_range = [
                list(values_by_seed(of_task, variant, "by_distance", i, "AP").values())
                for i in range(len(ranges))
            ]
            means = [statistics.fmean(values) for values in by_range]
            color = f"C{names.index(variant)}"
            panel.plot(middles, means, "-", color=color, label=variant)
            for middle, values in zip(middles, by_range):
                panel.plot([middle] * len(values), values, ".", color=color, alpha=0.5)
        panel.axvline(report["reach"], color="0.5", linestyle="--", linewidth=1)
        panel.annotate(
            f"receptive field of {report['baseline']}",
            (report["reach"], 2),
            xytext=(4, 0),
            textcoords="offset points",
            color="0.4",
            fontsize=8,
        )
        panel.set(title=task, xlabel="distance to the cue, pixels", ylim=(0, 100))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("box AP")
    panels[-1].legend(frameon=False, fontsize=8)
    return figure
