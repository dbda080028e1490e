"""Means of results, confidence intervals of paired differences, and tables in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

from scipy.stats import t as student_t

from ..utils.markdown import markdown_table

Results = Sequence[Mapping[str, Any]]

MIN_AP50 = 95  # percent, of a run that has learned its task


@dataclass(frozen=True)
class Difference:
    """Mean paired difference and the ends of its 95% interval, which are nan for a single pair."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "undefined"
        if math.isnan(self.low):
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Mean paired difference of ``values`` from ``baseline``, both by seed, with its 95% interval.

    The interval is Student's, for normal and independent differences.

    Raises:
        ValueError: If both share no seed.
    """
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline)]
    if not differences:
        raise ValueError("The difference of 0 pairs is not defined; both must share a seed.")
    mean = statistics.fmean(differences)
    if math.isnan(mean):  # an AP over no objects
        return Difference(math.nan, math.nan, math.nan)
    freedom = len(differences) - 1
    if freedom == 0:
        return Difference(mean, math.nan, math.nan)
    half = student_t.ppf(0.975, freedom) * statistics.stdev(differences) / math.sqrt(freedom + 1)
    return Difference(mean, mean - half, mean + half)


def tables(report: Mapping[str, Any], results: Results) -> str:
    """All tables of a suite in Markdown.

    Args:
        report: Content of report.json.
        results: Results of the suite's runs, not necessarily of all.
    """
    baseline = report["baseline"]
    parts = []
    for task in dict.fromkeys(run["task"] for run in results):
        of_task = [run for run in results if run["task"] == task]
        parts.append(f"Task: {task}\n\n" + overall_table(of_task, baseline))
        if "reach" in report:
            parts.append(distance_table(of_task, baseline, report["reach"]))
    return "\n".join([*parts, cost_table(report["costs"], baseline)])


def values_by_seed(results: Results, variant: str, *keys: Any) -> dict[int, float]:
    """A metric of a variant's runs, by seed.

    Args:
        results: Results of runs on one task.
        variant: Name of a variant of the suite.
        keys: Keys that lead to the metric in a result, such as "metrics", "bbox/AP".
    """
    runs = [run for run in results if run["variant"] == variant]
    return {run["seed"]: reduce(getitem, keys, run) for run in runs}


def overall_table(results: Results, baseline: str) -> str:
    """One row per variant: means and standard deviations of APs, paired differences, and learning.

    Where some seeds learn and others do not, a mean describes neither: so the number of those that
    did is beside it (see `has_learned`), and the median iteration by which they had.
    """
    rows = []
    for variant in variants(results):
        runs = [run for run in results if run["variant"] == variant]
        row = [variant]
        for metric in ("AP", "AP75"):
            column = "metrics", f"bbox/{metric}"
            values = values_by_seed(results, variant, *column)
            row += [_spread(values), _difference(results, variant, baseline, *column)]
        row.append(_spread(values_by_seed(results, variant, "metrics", "bbox/AP50")))
        any_class = {run["seed"]: run["metrics"].get("bbox/AP-any-class") for run in runs}
        row.append("" if None in any_class.values() else _spread(any_class))
        learned = [run["learned_at"] for run in runs if has_learned(run)]
        median = f"{statistics.median(learned):.0f}" if learned else ""
        rows.append([*row, f"{len(learned)} of {len(runs)}", median])
    head = ["variant", "AP", "difference", "AP75", "difference", "AP50", "AP, any class"]
    return markdown_table([*head, "learned", "by iteration"], rows)


def has_learned(run: Mapping[str, Any]) -> bool:
    """Whether 95% of the objects were classified rightly in training, and AP50 is at least 95."""
    return run["learned_at"] is not None and run["metrics"]["bbox/AP50"] >= MIN_AP50


def cost_table(costs: Mapping[str, Mapping[str, float]], baseline: str) -> str:
    """One row per variant: its costs and, in parentheses, their ratios to the baseline's."""
    units = {"parameters": 1, "flops": 1e6, "seconds": 1e-3, "bytes": 2**20}
    rows = []
    for variant, cost in costs.items():
        row = [f"{cost[k] / u:,.0f} ({cost[k] / costs[baseline][k]:.3f})" for k, u in units.items()]
        rows.append([variant, *row])
    return markdown_table(
        ["variant", "parameters", "MFLOPs", "ms/step", "activation memory, MiB"], rows
    )


def distance_table(results: Results, baseline: str, reach: float) -> str:
    """One row per variant, one column per range of distances: AP and its paired difference.

    The last column has the objects whose cue is more than ``reach`` pixels away, outside the
    baseline's receptive field.
    """
    first = results[0]
    ranges = first["by_distance"]
    columns = [*(("by_distance", i) for i in range(len(ranges))), ("beyond_reach",)]
    rows = []
    for variant in variants(results):
        cells = []
        for column in columns:
            values = values_by_seed(results, variant, *column, "AP")
            difference = _difference(results, variant, baseline, *column, "AP")
            mean = f"{statistics.fmean(values.values()):.1f}"
            cells.append(f"{mean} ({difference})" if difference else mean)
        rows.append([variant, *cells])
    names = [f"{r['low']:g} to {r['high']:g} px" for r in ranges] + [f"beyond {reach:.0f} px"]
    counts = [str(r["count"]) for r in (*ranges, first["beyond_reach"])]
    return markdown_table(["variant", *names], [["objects", *counts], *rows])


def variants(results: Results) -> list[str]:
    """Names of the variants in the order of their first results."""
    return list(dict.fromkeys(run["variant"] for run in results))


def _difference(results: Results, variant: str, baseline: str, *keys: Any) -> str:
    """The paired difference of a metric; empty for the baseline, or without a common seed."""
    values = values_by_seed(results, variant, *keys)
    before = values_by_seed(results, baseline, *keys)
    if variant == baseline or not values.keys() & before:
        return ""
    return str(paired_difference(values, before))


def _spread(values: Mapping[int, float]) -> str:
    """Mean and, for several values, the standard deviation."""
    mean = f"{statistics.fmean(values.values()):.1f}"
    return f"{mean} ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else mean
