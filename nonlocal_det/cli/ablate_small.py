"""Train a small network without a detector to see which settings of a block learn, in every seed.

    nonlocal-det ablate-small --suite ablation/small_network

The file of results gets one line per finished run, and finished runs are not repeated: the command
may be stopped and started at any time, also on another machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any, Optional

import torch

from ..ablation.results import read_results, write_results
from ..ablation.small_network import train
from ..ablation.small_suite import KEYS, Run, read_small_suite, tables
from ..errors import exit_on_error
from ..utils.file_io import ensure_writable_dir
from . import program_name
from .ablate import num_cores


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(
        prog=program_name("ablate-small"), description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add(
        "--suite",
        required=True,
        metavar="FILE",
        help="YAML file of the suite; a path, or a name of the model zoo",
    )
    add(
        "--results",
        metavar="FILE",
        help="JSON lines, one per finished run (default: output/ and the suite's name, .jsonl)",
    )
    add("--jobs", type=int, default=num_cores(), help="number of parallel runs (default: cores)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: it must be at least 1.")
    name = os.path.splitext(os.path.basename(args.suite))[0]
    args.results = args.results or os.path.join("output", f"{name}.jsonl")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train what is missing, and print the tables."""
    args = parse_args(argv)
    with exit_on_error():
        suite = read_small_suite(args.suite)
        results = read_results(args.results, KEYS)
        ensure_writable_dir(os.path.dirname(args.results) or ".", "--results")
    missing = suite.missing(results)
    print(f"{len(missing)} of {len(suite.runs())} runs to train", flush=True)
    for run, result in _train_all(missing, args.jobs):
        results.append({**asdict(run), **result})
        write_results(args.results, results)
        print(f"{run.task}, {run.variant}, seed {run.seed}: {result['accuracy']:.1%}", flush=True)
    print(f"\n{tables(suite, results)}")
    return 0


def _train_all(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Train in processes of one thread each; yield each run and its result as it finishes."""
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        pending = {pool.submit(train, run.task, run.settings, run.seed): run for run in runs}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        finally:  # also of an error or Ctrl-C: those that have not begun do not begin
            pool.shutdown(cancel_futures=True)
