"""Train a small Mask R-CNN with a non-local block, evaluate it, and draw the block's attention.

    nonlocal-det demo

It trains from scratch, on the lamps dataset, on the CPU, and takes some minutes. All output goes to
``output/demo``. Options are those of ``nonlocal-det train``, except for several processes:
``--resume`` continues a stopped demo; ``--eval-only`` evaluates MODEL.WEIGHTS, and draws.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Optional

import cv2
import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.utils.events import EventWriter, get_event_storage
from detectron2.utils.logger import setup_logger

from ..attention import AttentionRecorder, detection_figure
from ..checkpoint.detection_checkpoint import NonLocalCheckpointer
from ..checkpoint.latest import latest_checkpoint
from ..checkpoint.predictor import Predictor
from ..engine import Trainer, load_and_check_cfg, setup
from ..engine.output_dir import check_run_folder, lock_output_dir
from ..errors import TrainingError, exit_on_error
from ..utils.plotting import save_figure
from . import program_name

CONFIG = "lamps_mask_rcnn_R18_NL"
OUTPUT = os.path.join("output", "demo")
EVALUATION_LOG = "coco_eval.txt"
NUM_FIGURES = 6
METRICS = ("AP", "AP50", "AP75")


class DemoTrainer(Trainer):
    """The trainer with one short line of progress, and the output of pycocotools in a file."""

    def build_writers(self) -> list[EventWriter]:
        """detectron2's writers, with a short line on the screen instead of the long one."""
        return [*super().build_writers()[1:], ProgressLine(self.max_iter)]

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Mapping[str, float]]:
        """Evaluate; returns COCO's metrics by task."""
        print(f"\nEvaluating on {len(DatasetCatalog.get(cfg.DATASETS.TEST[0]))} images ...")
        with open(os.path.join(cfg.OUTPUT_DIR, EVALUATION_LOG), "w", encoding="utf-8") as file:
            with redirect_stdout(file):
                return super().test(cfg, model)

    def train(self) -> dict[str, Mapping[str, float]]:
        """Train and evaluate; returns COCO's metrics by task."""
        super().train()
        return self._last_eval_results


class ProgressLine(EventWriter):
    """Prints the iteration, the loss, and the time left."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._start = time.perf_counter()

    def write(self) -> None:
        """Print the line; detectron2 calls this every 20 iterations."""
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
    """Write detectron2's log to ``folder``, and show only its warnings on the screen.

    setup_logger caches by its arguments: these are the ones that default_setup will use.
    """
    fvcore = setup_logger(folder, distributed_rank=0, name="fvcore")
    for logger in (fvcore, setup_logger(folder, distributed_rank=0)):
        for handler in logger.handlers:
            if handler.stream is sys.stdout:
                handler.setLevel(logging.WARNING)


def print_table(results: Mapping[str, Mapping[str, float]]) -> None:
    """Print box and mask AP, and the AP of each category."""
    classes = [key for key in results["bbox"] if key.startswith("AP-")]
    columns = [*METRICS, *classes]
    print("\n        " + "".join(f"{column.replace('AP-', ''):>9}" for column in columns))
    for task, name in (("bbox", "box"), ("segm", "mask")):
        print(f"  {name:6}" + "".join(f"{results[task][column]:9.1f}" for column in columns))


def draw(cfg: CfgNode) -> list[str]:
    """Draw detections in some validation images, and the attention map of each; returns paths."""
    dataset = cfg.DATASETS.TEST[0]
    predictor = Predictor(cfg)
    paths = []
    for dataset_dict in DatasetCatalog.get(dataset)[:NUM_FIGURES]:
        image = cv2.imread(dataset_dict["file_name"])
        with AttentionRecorder(predictor.model) as recorder:
            found = predictor(image)["instances"].to("cpu")
        figure = detection_figure(
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
            found[found.scores > 0.5],
            recorder,
            metadata=MetadataCatalog.get(dataset),
            color_by_class=True,
        )
        name = os.path.splitext(os.path.basename(dataset_dict["file_name"]))[0]
        paths.append(os.path.join(cfg.OUTPUT_DIR, "attention", f"{name}.png"))
        save_figure(figure, paths[-1])
    return paths


def parse_args(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Parse detectron2's standard options, except for several processes."""
    parser: ArgumentParser = default_argument_parser(__doc__)
    parser.prog = program_name("demo")
    args = parser.parse_args(argv)
    if args.num_gpus > 1 or args.num_machines > 1:
        parser.error("the demo runs in one process: leave out --num-gpus and --num-machines.")
    args.config_file = args.config_file or CONFIG
    args.opts = ["OUTPUT_DIR", OUTPUT, *args.opts]
    return args


def start(args: Namespace) -> CfgNode:
    """Check everything and start the log, in a file."""
    cfg = load_and_check_cfg(args).cfg
    check_run_folder(
        cfg.OUTPUT_DIR,
        eval_only=args.eval_only,
        resume=args.resume,
        others=("attention", EVALUATION_LOG),
    )
    if not args.eval_only:
        lock_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    log_to_file(cfg.OUTPUT_DIR)
    return setup(args)


def train(cfg: CfgNode, resume: bool) -> tuple[dict[str, Mapping[str, float]], str]:
    """Train and evaluate; returns COCO's metrics by task, and the path of the weights."""
    positions = ", ".join(cfg.MODEL.NONLOCAL.POSITIONS)
    print(f"Training a Mask R-CNN R18-FPN with a non-local block at {positions} ...")
    with exit_on_error():
        trainer = DemoTrainer(cfg)
        trainer.resume_or_load(resume)
    with exit_on_error(TrainingError):
        return trainer.train(), os.path.join(cfg.OUTPUT_DIR, "model_final.pth")


def evaluate(cfg: CfgNode, resume: bool) -> tuple[dict[str, Mapping[str, float]], str]:
    """Evaluate; returns COCO's metrics by task, and the path of the weights."""
    weights = (latest_checkpoint(cfg.OUTPUT_DIR) if resume else "") or cfg.MODEL.WEIGHTS
    with exit_on_error(TrainingError):
        model = DemoTrainer.build_model(cfg)
        NonLocalCheckpointer(model).load(weights)
        return DemoTrainer.test(cfg, model), weights


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, evaluate and draw."""
    args = parse_args(argv)
    torch.set_num_threads(1)  # sums have one order: the same figures with any number of cores
    with exit_on_error():
        cfg = start(args)
    results, weights = (evaluate if args.eval_only else train)(cfg, args.resume)
    print_table(results)

    print("\nDrawing the attention of the block ...")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = weights
    for path in draw(cfg):
        print(" ", path)
    print(f"\nThe model is {weights}, the log {os.path.join(cfg.OUTPUT_DIR, 'log.txt')}.")
    return 0
