"""What can be seen before a run starts: all that would stop it once it has begun to write."""

from __future__ import annotations

import os
from argparse import Namespace

import torch.nn as nn
from detectron2.config import CfgNode

from ..attention.command import check_folder
from ..modeling.checks import build_without_memory, check_device, check_weights, said_by
from .trainer import Trainer


def check_run(cfg: CfgNode, args: Namespace) -> None:
    """See all that can be seen before anything is written.

    Raises:
        OSError: if a file or folder is not there, or not what it must be.
        ValueError: if anything else will not do.
    """
    needed = "TEST" if args.eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise ValueError(f"DATASETS.{needed} is empty; it must name a dataset.")
    check_device(cfg.MODEL.DEVICE)
    for key in ("IMS_PER_BATCH", "MAX_ITER"):
        if cfg.SOLVER[key] < 1:
            raise ValueError(f"SOLVER.{key} is {cfg.SOLVER[key]}; it must be at least 1.")
    model = build_without_memory(cfg)
    _build_solver(cfg, model)
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if not (args.resume and os.path.exists(last)):
        check_weights(cfg.MODEL.WEIGHTS, model, evaluates=args.eval_only)
    check_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")


def _build_solver(cfg: CfgNode, model: nn.Module) -> None:
    optimizer = Trainer.build_optimizer(cfg, model)
    try:
        Trainer.build_lr_scheduler(cfg, optimizer)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"The schedule of SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME!r}, STEPS "
            f"{cfg.SOLVER.STEPS} and MAX_ITER {cfg.SOLVER.MAX_ITER} cannot be built: "
            f"{said_by(error)}."
        ) from error
