#!/usr/bin/env python
"""Train and evaluate any configuration, with detectron2's standard flags.

python tools/train_net.py --config-file configs/mask_rcnn_R50_NL.yaml --num-gpus 8
torchrun --nproc_per_node 8 tools/train_net.py --config-file configs/mask_rcnn_R50_NL.yaml

Your own data are given by --train-json and --val-json; --check says what is wrong with them.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

import detectron2.utils.comm as comm
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation import verify_results

from nonlocal_det.engine import (
    AtomicCheckpointer,
    Trainer,
    launch,
    load_and_check_cfg,
    nonlocal_argument_parser,
    run_dataset_check,
    setup,
)
from nonlocal_det.errors import TrainingError, exit_on_error


def main(args: Namespace) -> Any:
    """Train, or with ``--eval-only`` evaluate; ends with one sentence if it cannot."""
    with exit_on_error():
        cfg = setup(args)
        if args.eval_only:
            model = Trainer.build_model(cfg)
            checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    with exit_on_error(TrainingError):
        return evaluate(cfg, model) if args.eval_only else train(cfg, trainer)


def train(cfg: CfgNode, trainer: Trainer) -> Any:
    """Train, and evaluate as configured."""
    if cfg.TEST.AUG.ENABLED:
        test = lambda: trainer.test_with_augmentation(cfg, trainer.model)  # noqa: E731
        trainer.register_hooks([hooks.EvalHook(0, test)])
    return trainer.train()


def evaluate(cfg: CfgNode, model: nn.Module) -> Any:
    """Evaluate, and see that the results are those expected, if any are."""
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_augmentation(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    arguments = nonlocal_argument_parser().parse_args()
    if arguments.check:
        with exit_on_error():
            sys.exit(not run_dataset_check(arguments))
    launch(main, arguments, lambda: load_and_check_cfg(arguments).device)
