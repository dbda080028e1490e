"""Train variants of a detector with several seeds, and test their differences.

    nonlocal-det ablate --suite ablation/lamps_cpu --output output/lamps_cpu

Finished runs are kept, and an interrupted one resumes from its last checkpoint: the command may be
stopped and started at any time. Runs of another configuration are refused. It writes results.json,
tables.md and, if the suite has distances, distance.png.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, Optional

from ..ablation.report import FILES, make_report, write_report
from ..ablation.runs import check_suite, train_all
from ..ablation.statistics import tables
from ..ablation.suite import read_suite
from ..errors import exit_on_error
from ..utils.file_io import ensure_writable_dir
from ..utils.outputs import CommandOutputs
from . import program_name


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(
        prog=program_name("ablate"), description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add(
        "--suite",
        required=True,
        metavar="FILE",
        help="YAML file of the suite; a path, or a name of the model zoo, as ablation/lamps_cpu",
    )
    add("--output", metavar="DIR", help="output directory (default: output/ and the suite's name)")
    add(
        "--jobs",
        type=int,
        help="number of parallel runs (default: 1 on a GPU, the number of cores on a CPU)",
    )
    add("--threads", type=int, default=1, help="number of CPU threads per run (default: 1)")
    args = parser.parse_args(argv)
    for name in ("jobs", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: it must be at least 1.")
    suite_name = os.path.splitext(os.path.basename(args.suite))[0]
    args.output = args.output or os.path.join("output", suite_name)
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, measure and report."""
    args = parse_args(argv)
    outputs = CommandOutputs("ablate")
    with exit_on_error():
        suite = read_suite(args.suite)
        outputs.check(*(os.path.join(args.output, name) for name in FILES))
        device = check_suite(suite, args.output)
        ensure_writable_dir(args.output)
    jobs = args.jobs or (1 if device == "cuda" else num_cores())
    total = len(suite.runs())
    print(f"{total} runs, {jobs} in parallel, below {args.output}", flush=True)
    results = []
    with exit_on_error(RuntimeError, ValueError, OSError):
        for result in train_all(suite, args.output, jobs=jobs, threads=args.threads):
            results.append(result)
            print(f"{len(results):4} of {total}  {progress_line(result)}", flush=True)
    report = make_report(suite, results, args.output)
    with exit_on_error(), outputs.drafts(args.output) as drafts:
        write_report(report, drafts)
    print(f"\n{tables(report)}\nWrote these tables to {os.path.join(args.output, 'tables.md')}.")
    return 0


def num_cores() -> int:
    """Number of CPU cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def progress_line(result: dict[str, Any]) -> str:
    """Name, box AP and seconds of a finished run."""
    name = f"{result['task']}, {result['variant']}, seed {result['seed']}"
    return f"{name:<40} box AP {result['metrics']['bbox/AP']:5.1f}   {result['seconds']:.0f} s"
