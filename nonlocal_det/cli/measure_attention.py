"""Measure whether the attention of each block depends on the query, over a dataset.

Writes attention.csv and attention.png. Without a config file it uses the model that the demo
trained.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Optional

from ..attention.recording.statistics import (
    dataset_stats,
    format_stats,
    plot_stats,
    write_stats_csv,
)
from ..engine import check_dataset_registered
from ..errors import exit_on_error
from ..utils.deprecation import RenamedOption
from ..utils.file_io import ensure_writable_dir
from ..utils.outputs import CommandOutputs
from . import program_name
from .model_args import add_model_arguments, setup_cfg

TABLE, PLOT = "attention.csv", "attention.png"


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("measure-attention"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--dataset", help="registered dataset (default: the first of DATASETS.TEST, or else TRAIN)")
    images = add(
        "--num-images", type=int, default=100, help="maximum number of images (default 100)"
    )
    queries = add(
        "--num-queries", type=int, default=64, help="queries sampled in each image (default 64)"
    )
    add("--images", action=RenamedOption, renamed=images)
    add("--queries", action=RenamedOption, renamed=queries)
    args = parser.parse_args(argv)
    if min(args.num_images, args.num_queries) < 1:
        parser.error("--num-images and --num-queries must be at least 1.")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Compute the statistics, print them, and write them as a table and a plot."""
    args = parse_args(argv)
    outputs = CommandOutputs("measure-attention")
    with exit_on_error():
        ensure_writable_dir(args.output)
        outputs.check(*(os.path.join(args.output, name) for name in (TABLE, PLOT)))
        cfg = setup_cfg(args)
        dataset = args.dataset or next(iter((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)), "")
        if not dataset:
            raise ValueError("DATASETS.TEST is empty; give --dataset or --val-json.")
        check_dataset_registered(dataset)
        stats = dataset_stats(
            cfg, dataset, num_images=args.num_images, num_queries=args.num_queries
        )
        print(format_stats(stats))
        with outputs.drafts(args.output) as drafts:
            write_stats_csv(stats, os.path.join(drafts, TABLE))
            plot_stats(stats, os.path.join(drafts, PLOT))
    return 0
