#!/usr/bin/env python
"""Measure whether the attention of each block depends on the query at all, over a dataset.

    python tools/measure_attention.py --output measured
    python tools/measure_attention.py --config-file configs/mask_rcnn_R50_NL.yaml \
        --weights model_final.pth --dataset coco_2017_val --images 500 --output measured

Writes attention.csv and attention.png; nonlocal_det/attention/statistics.py says what the numbers
are. Without a configuration it takes the model that ``tools/demo.py`` trained.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Optional

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model

from nonlocal_det.attention import AttentionRecorder
from nonlocal_det.attention.statistics import AttentionStats, mean, measure, plot, write_table
from nonlocal_det.cli.model_args import add_model_arguments, setup_cfg
from nonlocal_det.engine import check_dataset_registered
from nonlocal_det.errors import exit_on_error
from nonlocal_det.utils.file_io import ensure_writable_dir


def parse_args(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--dataset", help="by default the first of DATASETS.TEST")
    parser.add_argument("--images", type=int, default=100, help="how many, at most (default 100)")
    parser.add_argument("--queries", type=int, default=64, help="in each image (default 64)")
    options = parser.parse_args(arguments)
    if min(options.images, options.queries) < 1:
        parser.error("--images and --queries must be at least 1.")
    return options


def measure_dataset(
    cfg: CfgNode, dataset: str, images: int, queries: int
) -> dict[str, AttentionStats]:
    """The mean numbers of each block over the first images; blocks never reached are left out."""
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    recorder, mapper = AttentionRecorder(model), DatasetMapper(cfg, is_train=False)
    found: dict[str, list[Optional[AttentionStats]]] = {name: [] for name in recorder.blocks}
    for seed, record in enumerate(DatasetCatalog.get(dataset)[:images]):
        with torch.no_grad(), recorder:
            model([mapper(record)])
        for name in recorder.recorded:
            found[name].append(measure(recorder, name, queries=queries, seed=seed))
    means = {name: mean(numbers) for name, numbers in found.items()}
    return {name: numbers for name, numbers in means.items() if numbers is not None}


def print_table(numbers: dict[str, AttentionStats]) -> None:
    """A row for each block."""
    width = max(map(len, numbers), default=5)
    print(" " * width + "".join(f"{field.name:>10}" for field in fields(AttentionStats)))
    for name, row in numbers.items():
        print(f"{name:{width}}" + "".join(f"{value:10.4f}" for value in astuple(row)))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Measure, print, write."""
    args = parse_args(arguments)
    with exit_on_error():
        ensure_writable_dir(args.output)
        cfg = setup_cfg(args)
        dataset = args.dataset or cfg.DATASETS.TEST[0]
        check_dataset_registered(dataset)
        numbers = measure_dataset(cfg, dataset, args.images, args.queries)
        print_table(numbers)
        write_table(numbers, os.path.join(args.output, "attention.csv"))
        plot(numbers, os.path.join(args.output, "attention.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
