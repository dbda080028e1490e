#!/usr/bin/env python
"""Train variants of a detector with several seeds, and say how sure their differences are.

    python tools/run_ablation.py --suite configs/ablation/lamps_cpu.yaml --output output/lamps_cpu

Runs that are done are kept, and one that was interrupted goes on from its last checkpoint: stop and
start it as you like. It leaves results.json, tables.md and, where the suite names distances,
distance.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any, Optional

import torch
from analyze_blocks import analyze
from analyze_blocks import build as build_to_count
from benchmark import processor
from benchmark_model import train as train_step
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn

from nonlocal_det.ablation.plot import distance_plot
from nonlocal_det.ablation.receptive_field import receptive_field_radius
from nonlocal_det.ablation.runs import distances, train_all
from nonlocal_det.ablation.statistics import tables
from nonlocal_det.ablation.suite import Suite, read_suite
from nonlocal_det.config import load_config
from nonlocal_det.engine import Trainer, check_dataset_registered
from nonlocal_det.errors import exit_on_error
from nonlocal_det.modeling.supported_positions import check_positions
from nonlocal_det.utils.file_io import atomic_write
from nonlocal_det.utils.plotting import save_figure

TRAIN_NET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train_net.py")
ROUNDS = 7

Cost = dict[str, float]


def measure_costs(suite: Suite, rounds: int = ROUNDS) -> dict[str, Cost]:
    """Of a training step of each variant, on the first batch of the first task.

    Returns:
        By variant, ``parameters``, ``flops`` (of inference), ``seconds`` (the median of ``rounds``
        in which the variants take turns) and ``bytes``, what is kept for the backward pass.
    """
    task = next(iter(suite.tasks))
    models, costs = {}, {}
    for variant in suite.variants:
        options = suite.options(task, variant, suite.seeds[0])
        cfg = load_config(suite.config, options)
        torch.manual_seed(0)
        models[variant] = build_model(cfg)
        batch = next(iter(Trainer.build_train_loader(cfg)))
        counted = analyze(build_to_count(suite.config, list(options)), batch[0]["image"].shape[1:])
        costs[variant] = {
            **counted["total"],
            "bytes": saved_activation_bytes(models[variant], batch),
        }
    seconds: dict[str, list[float]] = {variant: [] for variant in models}
    for _ in range(rounds):
        for variant, model in models.items():
            start = time.perf_counter()
            train_step(model, batch)
            seconds[variant].append(time.perf_counter() - start)
    for variant, values in seconds.items():
        costs[variant]["seconds"] = statistics.median(values)
    return costs


def saved_activation_bytes(model: nn.Module, batch: list[dict[str, Any]]) -> int:
    """What a training step keeps for its backward pass, in bytes, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_step(model, batch)
    return sum(kept.values())


def parse_args(arguments: Optional[list[str]] = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--suite", required=True, metavar="FILE", help="what to compare: see configs/ablation")
    add("--output", metavar="FOLDER", help="default: output/ and the suite's name")
    add("--jobs", type=int, help="trainings at once; default: on CPUs one a core, on a GPU one")
    add("--threads", type=int, default=1, help="CPU threads of each; default 1")
    args = parser.parse_args(arguments)
    name = os.path.splitext(os.path.basename(args.suite))[0]
    args.output = args.output or os.path.join("output", name)
    return args


def check(suite: Suite) -> str:
    """The device that a suite trains on, if each of its runs can start.

    Raises:
        ValueError: for a key, value or position that does not exist, before anything is trained.
        FileNotFoundError: for a missing dataset.
    """
    for run in suite.runs():
        cfg = load_config(suite.config, run.options)
        check_positions(cfg)
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            check_dataset_registered(name)
    return cfg.MODEL.DEVICE


def main(arguments: Optional[list[str]] = None) -> None:
    """Train, measure, report."""
    args = parse_args(arguments)
    with exit_on_error():
        suite = read_suite(args.suite)
        device = check(suite)
    jobs = args.jobs or (1 if device == "cuda" else len(os.sched_getaffinity(0)))
    total = len(suite.runs())
    print(f"{total} runs, {jobs} at once, below {args.output}", flush=True)
    results = []
    with exit_on_error(RuntimeError):
        for result in train_all(
            suite, args.output, [sys.executable, TRAIN_NET], jobs=jobs, threads=args.threads
        ):
            results.append(result)
            print(f"{len(results):4} of {total}  {line(result)}", flush=True)
    report = {
        "suite": args.suite,
        "machine": f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "baseline": suite.baseline,
        "costs": measure_costs(suite),
        "runs": in_suite_order(suite, results),
    }
    if suite.distances:
        reach = report["reach"] = measure_reach(suite)
        for run, result in zip(suite.runs(), report["runs"]):
            result.update(distances(suite, run, args.output, reach))
    write_report(report, args.output)


def in_suite_order(suite: Suite, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results as the suite has its runs, whichever was done first."""
    by_run = {(result["task"], result["variant"], result["seed"]): result for result in results}
    return [by_run[run.task, run.variant, run.seed] for run in suite.runs()]


def measure_reach(suite: Suite) -> float:
    """How far from its largest object's centre a cue may be for the baseline to see any of it."""
    task = next(iter(suite.tasks))
    cfg = load_config(suite.config, suite.options(task, suite.baseline, suite.seeds[0]))
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    size = max(max(a["bbox"][2:]) for record in records for a in record["annotations"])
    shape = records[0]["width"], records[0]["height"]
    return receptive_field_radius(build_model(cfg), size, *shape) + suite.cue_radius


def write_report(report: dict[str, Any], folder: str) -> None:
    """Write results.json, tables.md and distance.png, and say where."""
    with atomic_write(os.path.join(folder, "results.json")) as file:
        json.dump(report, file, indent=1)
    with atomic_write(os.path.join(folder, "tables.md")) as file:
        file.write(tables(report))
    print(f"\n{tables(report)}\nThese tables are {os.path.join(folder, 'tables.md')}.")
    if "reach" in report:
        save_figure(distance_plot(report), os.path.join(folder, "distance.png"))


def line(result: dict[str, Any]) -> str:
    """A run and its box AP."""
    name = f"{result['task']}, {result['variant']}, seed {result['seed']}"
    return f"{name:<40} box AP {result['metrics']['bbox/AP']:5.1f}   {result['seconds']:.0f} s"


if __name__ == "__main__":
    main()
