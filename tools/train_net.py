#!/usr/bin/env python
"""Train and evaluate any configuration, with detectron2's standard flags.

    python tools/train_net.py --config-file configs/mask_rcnn_R50_NL.yaml --num-gpus 8

Your own data are given by --train-json and --val-json; --check says what is wrong with them.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

import detectron2.utils.comm as comm
from detectron2.engine import hooks, launch
from detectron2.evaluation import verify_results

from nonlocal_det.engine import (
    PictureError,
    Trainer,
    argument_parser,
    check_data,
    one_sentence_errors,
    setup,
)
from nonlocal_det.modeling.checkpoint import NonLocalCheckpointer


def main(args: Namespace) -> Any:
    """Train, or with ``--eval-only`` evaluate; ends with one sentence if the input is wrong."""
    with one_sentence_errors():
        cfg = setup(args)
        if args.eval_only:
            model = Trainer.build_model(cfg)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)

    if not args.eval_only:
        if cfg.TEST.AUG.ENABLED:
            test = lambda: trainer.test_with_augmentation(cfg, trainer.model)  # noqa: E731
            trainer.register_hooks([hooks.EvalHook(0, test)])
        with one_sentence_errors(PictureError):
            return trainer.train()

    NonLocalCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=args.resume
    )
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
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
