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
    RunFailure,
    Trainer,
    WholeCheckpointer,
    argument_parser,
    check_data,
    checked_config,
    launch,
    one_sentence_errors,
    setup,
)


def main(args: Namespace) -> Any:
    """Train, or with ``--eval-only`` evaluate; ends with one sentence if it cannot."""
    with one_sentence_errors():
        cfg = setup(args)
        if args.eval_only:
            model = Trainer.build_model(cfg)
            checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    with one_sentence_errors(RunFailure):
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
    arguments = argument_parser().parse_args()
    if arguments.check:
        with one_sentence_errors():
            sys.exit(not check_data(arguments))
    launch(main, arguments, lambda: checked_config(arguments).device)
