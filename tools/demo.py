#!/usr/bin/env python
"""Train a small Mask R-CNN with a non-local block, evaluate it, and draw what the block looks at.

    python tools/demo.py

It starts from scratch, on the embedded dataset, on the CPU, and takes some minutes. Everything
lands in ``output/demo``; options are those of ``tools/train_net.py``.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import redirect_stdout

import cv2
import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, default_argument_parser
from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger

from nonlocal_det.attention import AttentionRecorder, detection_figure
from nonlocal_det.engine import Trainer, load_and_check_cfg, setup
from nonlocal_det.errors import TrainingError, exit_on_error
from nonlocal_det.utils.plotting import save_figure

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = "lamps_mask_rcnn_R18_NL.yaml"
PICTURES = 6
METRICS = ("AP", "AP50", "AP75")


class DemoTrainer(Trainer):
    """The trainer, with one short line of progress, and what pycocotools prints in a file."""

    def build_writers(self) -> list[EventWriter]:
        """detectron2's writers, with a line of our own instead of the long one on the screen."""
        return [*super().build_writers()[1:], ProgressLine(self.max_iter)]

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Mapping[str, float]]:
        """COCO's metrics by task."""
        print(f"\nEvaluating on {len(DatasetCatalog.get(cfg.DATASETS.TEST[0]))} pictures ...")
        with open(os.path.join(cfg.OUTPUT_DIR, "coco_eval.txt"), "w", encoding="utf-8") as file:
            with redirect_stdout(file):
                return super().test(cfg, model)

    def train(self) -> dict[str, Mapping[str, float]]:
        """Train and evaluate."""
        super().train()
        return self._last_eval_results


class ProgressLine(EventWriter):
    """Prints where training is, what the loss is, and how long it will take."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._start = time.perf_counter()

    def write(self) -> None:
        """Called by detectron2 every 20 iterations."""
        storage = get_event_storage()
        done = storage.iter + 1
        if done > self._last:  # after the evaluation
            return
        left = (time.perf_counter() - self._start) / done * (self._last - done)
        loss = storage.history("total_loss").median(20)
        print(
            f"  iteration {done:4d} of {self._last}   loss {loss:.2f}   "
            f"{int(left) // 60}:{int(left) % 60:02d} left",
            flush=True,
        )


def log_to_file(folder: str) -> None:
    """Keep detectron2's long log in ``folder``, and only its warnings on the screen.

    setup_logger remembers the arguments it was called with: these are the ones that default_setup
    will use.
    """
    fvcore = setup_logger(folder, distributed_rank=0, name="fvcore")
    for logger in (fvcore, setup_logger(folder, distributed_rank=0)):
        for handler in logger.handlers:
            if handler.stream is sys.stdout:
                handler.setLevel(logging.WARNING)


def print_table(results: Mapping[str, Mapping[str, float]]) -> None:
    """Box and mask AP, and the AP of each category."""
    classes = [key for key in results["bbox"] if key.startswith("AP-")]
    columns = [*METRICS, *classes]
    print("\n        " + "".join(f"{column.replace('AP-', ''):>9}" for column in columns))
    for task, name in (("bbox", "box"), ("segm", "mask")):
        print(f"  {name:6}" + "".join(f"{results[task][column]:9.1f}" for column in columns))


def draw(cfg: CfgNode) -> list[str]:
    """Draw detections, and what the block looks at from each, for some validation pictures."""
    dataset = cfg.DATASETS.TEST[0]
    predictor = DefaultPredictor(cfg)
    paths = []
    for record in DatasetCatalog.get(dataset)[:PICTURES]:
        image = cv2.imread(record["file_name"])
        with AttentionRecorder(predictor.model) as recorder:
            found = predictor(image)["instances"].to("cpu")
        figure = detection_figure(
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
            found[found.scores > 0.5],
            recorder,
            metadata=MetadataCatalog.get(dataset),
            color_by_class=True,
        )
        name = os.path.splitext(os.path.basename(record["file_name"]))[0]
        paths.append(os.path.join(cfg.OUTPUT_DIR, "attention", f"{name}.png"))
        save_figure(figure, paths[-1])
    return paths


def main(args: Namespace) -> None:
    """Train, evaluate, draw."""
    torch.set_num_threads(1)  # sums in one order: the same pictures with any number of cores
    args.config_file = args.config_file or os.path.join(PROJECT, "configs", CONFIG)
    folder = os.path.relpath(os.path.join(PROJECT, "output", "demo"))
    args.opts = ["OUTPUT_DIR", folder, *args.opts]
    with exit_on_error():
        log_to_file(load_and_check_cfg(args).cfg.OUTPUT_DIR)
        cfg = setup(args)

    positions = ", ".join(cfg.MODEL.NONLOCAL.POSITIONS)
    print(f"Training a Mask R-CNN R18-FPN with a non-local block at {positions} ...")
    with exit_on_error(TrainingError):
        results = DemoTrainer(cfg).train()
    print_table(results)

    print("\nDrawing what the block looks at ...")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    for path in draw(cfg):
        print(" ", path)
    print(f"\nThe model is {cfg.MODEL.WEIGHTS}, the log {os.path.join(cfg.OUTPUT_DIR, 'log.txt')}.")


if __name__ == "__main__":
    main(default_argument_parser(__doc__).parse_args())
