#!/usr/bin/env python
r"""Train and evaluate a LazyConfig, with detectron2's standard flags; overrides are KEY=VALUE.

python tools/lazyconfig_train_net.py --num-gpus 8 \
    --config-file configs/lazy/mask_rcnn_R50_NL.py train.output_dir=output/R50
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from detectron2.engine import default_argument_parser

from nonlocal_det.engine import AtomicCheckpointer, launch
from nonlocal_det.engine.lazy_trainer import LazyTrainer, load_and_check_cfg, setup
from nonlocal_det.errors import TrainingError, exit_on_error


def main(args: Namespace) -> Any:
    """Train, or with ``--eval-only`` evaluate; ends with one sentence if it cannot."""
    with exit_on_error():
        cfg = setup(args)
        if args.eval_only:
            model = LazyTrainer.build_model(cfg)
            AtomicCheckpointer(model).load(cfg.train.init_checkpoint)
        else:
            trainer = LazyTrainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    with exit_on_error(TrainingError):
        return LazyTrainer.test(cfg, model) if args.eval_only else trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    launch(main, arguments, lambda: load_and_check_cfg(arguments).device)
