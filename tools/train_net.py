#!/usr/bin/env python
"""Train and evaluate any configuration, with detectron2's standard flags.

python tools/train_net.py --config-file configs/mask_rcnn_R50_NL.yaml --num-gpus 8
torchrun --nproc_per_node 8 tools/train_net.py --config-file configs/mask_rcnn_R50_NL.yaml
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import detectron2.utils.comm as comm
from detectron2.engine import default_argument_parser, hooks
from detectron2.evaluation import verify_results

from nonlocal_det.engine import (
    Trainer,
    TrainingFailure,
    WholeCheckpointer,
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
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)

    if not args.eval_only:
        if cfg.TEST.AUG.ENABLED:
            test = lambda: trainer.test_with_augmentation(cfg, trainer.model)  # noqa: E731
            trainer.register_hooks([hooks.EvalHook(0, test)])
        with one_sentence_errors(TrainingFailure):
            return trainer.train()

    WholeCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_augmentation(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    with one_sentence_errors():
        # Before any other process starts, so that one alone says what is wrong.
        _, device = checked_config(arguments)
    launch(main, arguments, device)
