"""Train variants of a detector with several seeds, and test their differences.

    nonlocal-det ablate --suite ablation/lamps --output output/lamps

Finished runs are kept, and an interrupted one resumes from its last checkpoint: the command may be
stopped and started at any time, and with the file of results also on another machine. Runs of
another configuration are refused. In the end it writes report.json, tables.md and, if the suite has
distances, distance.png.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Optional

from ..ablation.report import FILES, baseline_reach, make_report, write_report
from ..ablation.results import Result, read_results, write_results
from ..ablation.runs import KEYS, check_runs, missing_runs, results_of, train_all
from ..ablation.statistics import tables
from ..ablation.suite import Run, Suite, read_suite
from ..config import load_config
from ..engine.training_process import num_cores
from ..errors import exit_on_error
from ..utils.file_io import ensure_writable_dir
from ..utils.outputs import CommandOutputs
from ..utils.validation import check_choice
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
        help="YAML file of the suite; a path, or a name of the model zoo, as ablation/lamps",
    )
    add("--output", metavar="DIR", help="output directory (default: output/ and the suite's name)")
    add(
        "--results",
        metavar="FILE",
        help="JSON lines, one per finished run (default: results.jsonl in the output directory)",
    )
    add(
        "--report-only",
        action="store_true",
        help="train nothing; report the runs that are finished",
    )
    for part in ("tasks", "variants", "seeds"):
        add(
            f"--{part}",
            nargs="+",
            metavar=part[:-1].upper(),
            type=int if part == "seeds" else str,
            help=f"train these {part} only (default: all)",
        )
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
    args.results = args.results or os.path.join(args.output, "results.jsonl")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, measure and report."""
    args = parse_args(argv)
    outputs = CommandOutputs("ablate")
    with exit_on_error():
        suite = read_suite(args.suite)
        results = read_results(args.results, KEYS)
        reach = baseline_reach(suite)
        missing = chosen(suite, missing_runs(suite, results, reach), args)
        if args.report_only:
            missing = []
        outputs.check(*(os.path.join(args.output, name) for name in FILES))
        check_runs(suite, missing, args.output)
        for folder in (args.output, os.path.dirname(args.results) or "."):
            ensure_writable_dir(folder)
    results = results_of(suite, [*results, *_train(suite, missing, results, reach, args)])
    with exit_on_error():
        if not results:
            raise ValueError(f"{args.results!r} has no finished run of the suite to report.")
    report = make_report(suite, reach, results)
    with exit_on_error(), outputs.drafts(args.output) as drafts:
        write_report(report, results, drafts)
    text = tables(report, results)
    print(f"\n{text}\nWrote these tables to {os.path.join(args.output, 'tables.md')}.")
    return 0


def chosen(suite: Suite, runs: Sequence[Run], args: argparse.Namespace) -> list[Run]:
    """Those of the runs whose task, variant and seed the options name.

    Raises:
        ValueError: If the suite has not what an option names.
    """
    for part in ("tasks", "variants", "seeds"):
        for name in getattr(args, part) or ():
            check_choice(f"--{part} of {suite.file!r}", name, tuple(getattr(suite, part)))
    return [
        run
        for run in runs
        if run.task in (args.tasks or suite.tasks)
        and run.variant in (args.variants or suite.variants)
        and run.seed in (args.seeds or suite.seeds)
    ]


def _train(
    suite: Suite, missing: Sequence[Run], done: list[Result], reach: float, args: argparse.Namespace
) -> list[Result]:
    """Train the missing runs, and add the result of each to the file; return the new results."""
    on_gpu = load_config(suite.config, suite.runs()[0].options).MODEL.DEVICE == "cuda"
    jobs = args.jobs or (1 if on_gpu else num_cores())
    print(f"{len(missing)} runs, {jobs} in parallel, below {args.output}", flush=True)
    results: list[Result] = []
    with exit_on_error(RuntimeError, ValueError, OSError):
        for result in train_all(
            suite, missing, args.output, jobs=jobs, threads=args.threads, reach=reach
        ):
            results.append(result)
            write_results(args.results, [*done, *results])
            print(f"{len(results):4} of {len(missing)}  {progress_line(result)}", flush=True)
    return results


def progress_line(result: Result) -> str:
    """Name, box AP and seconds of a finished run."""
    name = f"{result['task']}, {result['variant']}, seed {result['seed']}"
    return f"{name:<40} box AP {result['metrics']['bbox/AP']:5.1f}   {result['seconds']:.0f} s"
