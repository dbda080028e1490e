"""Means of results, confidence intervals of paired differences, and tables in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

from scipy.stats import t as student_t

Results = Sequence[Mapping[str, Any]]

LEARNED = 95  # AP50 in percent from which on a run has learned its task


@dataclass(frozen=True)
class Difference:
    """Mean paired difference and the ends of its 95% interval, which are nan for a single pair."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
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
    freedom = len(differences) - 1
    if freedom == 0:
        return Difference(mean, math.nan, math.nan)
    half = student_t.ppf(0.975, freedom) * statistics.stdev(differences) / math.sqrt(freedom + 1)
    return Difference(mean, mean - half, mean + half)


def tables(report: Mapping[str, Any]) -> str:
    """All tables of a report, the content of results.json, in Markdown."""
    results, baseline = report["runs"], report["baseline"]
    parts = []
    for task in dict.fromkeys(run["task"] for run in results):
        parts.append(f"Task: {task}\n\n" + overall_table(results, task, baseline))
        if "reach" in report:
            parts.append(distance_table(results, task, baseline, report["reach"]))
    return "\n".join([*parts, cost_table(report["costs"], baseline)])


def values_by_seed(results: Results, task: str, variant: str, *keys: Any) -> dict[int, float]:
    """A metric of a variant's runs on a task, by seed.

    Args:
        results: Results of the runs.
        task: Name of a task of the suite.
        variant: Name of a variant of the suite.
        keys: Keys that lead to the metric in a result, such as "metrics", "bbox/AP".
    """
    runs = [run for run in results if (run["task"], run["variant"]) == (task, variant)]
    return {run["seed"]: reduce(getitem, keys, run) for run in runs}


def overall_table(results: Results, task: str, baseline: str) -> str:
    """One row per variant: means and standard deviations of APs, and the paired differences.

    Beside them is the share of the seeds that learned the task, with an AP50 of `LEARNED` or more:
    where some do and others do not, a mean describes neither.
    """
    metrics = ("AP", "AP50", "AP75")
    rows = []
    for variant in variants(results):
        row = [variant]
        for metric in metrics:
            values = values_by_seed(results, task, variant, "metrics", f"bbox/{metric}")
            before = values_by_seed(results, task, baseline, "metrics", f"bbox/{metric}")
            row.append(_spread(values))
            row.append("" if variant == baseline else str(paired_difference(values, before)))
        ap50 = values_by_seed(results, task, variant, "metrics", "bbox/AP50").values()
        learned = sum(value >= LEARNED for value in ap50)
        rows.append([*row, f"{learned / len(ap50):.0%}", str(len(ap50))])
    head = [name for metric in metrics for name in (metric, "difference")]
    return markdown(["variant", *head, "share of seeds that learned", "seeds"], rows)


def cost_table(costs: Mapping[str, Mapping[str, float]], baseline: str) -> str:
    """One row per variant: its costs and, in parentheses, their ratios to the baseline's."""
    units = {"parameters": 1, "flops": 1e6, "seconds": 1e-3, "bytes": 2**20}
    rows = []
    for variant, cost in costs.items():
        row = [f"{cost[k] / u:,.0f} ({cost[k] / costs[baseline][k]:.3f})" for k, u in units.items()]
        rows.append([variant, *row])
    return markdown(["variant", "parameters", "MFLOPs", "ms/step", "activation memory, MiB"], rows)


def distance_table(results: Results, task: str, baseline: str, reach: float) -> str:
    """One row per variant, one column per range of distances: AP and its paired difference.

    The last column has the objects whose cue is more than ``reach`` pixels away, outside the
    baseline's receptive field.
    """
    first = next(run for run in results if run["task"] == task)
    ranges = first["by_distance"]
    columns = [*(("by_distance", i) for i in range(len(ranges))), ("beyond_reach",)]
    rows = []
    for variant in variants(results):
        cells = []
        for column in columns:
            values = values_by_seed(results, task, variant, *column, "AP")
            before = values_by_seed(results, task, baseline, *column, "AP")
            difference = "" if variant == baseline else f" ({paired_difference(values, before)})"
            cells.append(f"{statistics.fmean(values.values()):.1f}{difference}")
        rows.append([variant, *cells])
    names = [f"{r['low']:g} to {r['high']:g} px" for r in ranges] + [f"beyond {reach:.0f} px"]
    counts = [str(r["count"]) for r in (*ranges, first["beyond_reach"])]
    return markdown(["variant", *names], [["objects", *counts], *rows])


def variants(results: Results) -> list[str]:
    """Names of the variants in the order of their first results."""
    return list(dict.fromkeys(run["variant"] for run in results))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns except the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _spread(values: Mapping[int, float]) -> str:
    """Mean and, for several values, the standard deviation."""
    mean = f"{statistics.fmean(values.values()):.1f}"
    return f"{mean} ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else mean
