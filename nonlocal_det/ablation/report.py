"""The report of a finished suite: results.json, tables.md and distance.png."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from ..benchmark.report import processor_name
from ..config import load_config
from ..utils.file_io import atomic_write
from ..utils.plotting import save_figure
from .costs import measure_costs
from .plot import distance_plot
from .receptive_field import receptive_field_radius
from .runs import evaluate_by_distance
from .statistics import tables
from .suite import Suite

FILES = ("results.json", "tables.md", "distance.png")


def make_report(suite: Suite, results: Iterable[dict[str, Any]], folder: str) -> dict[str, Any]:
    """Collect a suite's results, and measure what its variants cost.

    Args:
        suite: Suite whose runs are finished.
        results: Results of all runs, in any order.
        folder: Output folder of the suite.

    Returns:
        The content of results.json. With distances in the suite, ``reach`` is the distance in
        pixels from which on a cue is outside the baseline's receptive field.
    """
    by_run = {(result["task"], result["variant"], result["seed"]): result for result in results}
    report = {
        "suite": suite.file,
        "machine": f"{processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "baseline": suite.baseline,
        "costs": measure_costs(suite),
        "runs": [by_run[run.task, run.variant, run.seed] for run in suite.runs()],
    }
    if suite.distances:
        report["reach"] = baseline_reach(suite)
        for run, result in zip(suite.runs(), report["runs"]):
            result.update(evaluate_by_distance(suite, run, folder, report["reach"]))
    return report


def baseline_reach(suite: Suite) -> float:
    """Distance in pixels from which on a cue is outside the baseline's receptive field.

    It is measured from the center of the largest object, to the center of the cue.
    """
    task = next(iter(suite.tasks))
    cfg = load_config(suite.config, suite.options(task, suite.baseline, suite.seeds[0]))
    dataset = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    size = max(max(a["bbox"][2:]) for image in dataset for a in image["annotations"])
    shape = dataset[0]["width"], dataset[0]["height"]
    return receptive_field_radius(build_model(cfg), size, *shape) + suite.cue_radius


def write_report(report: dict[str, Any], folder: str) -> None:
    """Write the `FILES`; the plot, the last one, only if the suite has distances."""
    results, text, plot = (os.path.join(folder, name) for name in FILES)
    with atomic_write(results) as file:
        json.dump(report, file, indent=1)
    with atomic_write(text) as file:
        file.write(tables(report))
    if "reach" in report:
        save_figure(distance_plot(report), plot)
