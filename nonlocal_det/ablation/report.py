"""The report of a suite's results: report.json, tables.md and distance.png."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch

from ..benchmark.report import processor_name
from ..config import load_config
from ..utils.file_io import atomic_write
from ..utils.plotting import save_figure
from .costs import measure_costs
from .plot import distance_plot
from .receptive_field import cue_reach
from .results import Result
from .statistics import tables
from .suite import Suite

FILES = ("report.json", "tables.md", "distance.png")


def make_report(suite: Suite, reach: float, results: Sequence[Result]) -> dict[str, Any]:
    """Measure what a suite's variants cost; return the content of report.json.

    Args:
        suite: The suite.
        results: Results of finished runs; only their variants, and the baseline, are measured.
        reach: Result of `baseline_reach`, which counts if the suite has distances.
    """
    measured = {suite.baseline, *(result["variant"] for result in results)}
    report = {
        "suite": suite.file,
        "machine": f"{processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "baseline": suite.baseline,
        "costs": measure_costs(suite, [v for v in suite.variants if v in measured]),
    }
    if suite.distances:
        report["reach"] = reach
    return report


def baseline_reach(suite: Suite) -> float:
    """Distance from which on a cue is outside the baseline's receptive field, by `cue_reach`.

    It is 0 if the suite has no distances.
    """
    if not suite.distances:
        return 0
    task = next(iter(suite.tasks))
    cfg = load_config(suite.config, suite.options(task, suite.baseline, suite.seeds[0]))
    return cue_reach(cfg, suite.cue_radius)


def write_report(report: dict[str, Any], results: Sequence[Result], folder: str) -> None:
    """Write the `FILES`; the plot, the last one, only if the suite has distances."""
    costs, text, plot = (os.path.join(folder, name) for name in FILES)
    with atomic_write(costs) as file:
        json.dump(report, file, indent=1)
    with atomic_write(text) as file:
        file.write(tables(report, results))
    if "reach" in report:
        save_figure(distance_plot(report, results), plot)
