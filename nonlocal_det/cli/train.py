"""``nonlocal-det train``: train and evaluate a YAML config, with detectron2's flags."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Optional

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation import verify_results

from ..checkpoint.atomic_checkpoint import AtomicCheckpointer
from ..engine.dataset_check import run_dataset_check
from ..engine.defaults import device_of, load_and_check_cfg, nonlocal_argument_parser, setup
from ..engine.launch import launch
from ..engine.trainer import Trainer
from ..errors import TrainingError, exit_on_error
from . import program_name


def parse_args(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Parse detectron2's flags, and those for custom datasets."""
    parser = nonlocal_argument_parser()
    parser.prog = program_name("train")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, evaluate (``--eval-only``) or check datasets (``--check-data``).

    Args:
        argv: Command line without the program's name; by default that of this process.

    Returns:
        Exit code.
    """
    args = parse_args(argv)
    if args.check_data:
        with exit_on_error():
            return 0 if run_dataset_check(args) else 1
    launch(run, args, lambda: device_of(args), lambda: load_and_check_cfg(args))
    return 0


def run(args: Namespace) -> Any:
    """Train or evaluate in one of the run's processes; return the results."""
    with exit_on_error():
        cfg = setup(args)
    return evaluate(cfg, args.resume) if args.eval_only else train(cfg, args.resume)


def train(cfg: CfgNode, resume: bool) -> Any:
    """Train, and evaluate as configured; return the last results.

    Args:
        cfg: Config from `setup`.
        resume: Whether to resume from the last checkpoint, if there is one.
    """
    with exit_on_error():
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
    if cfg.TEST.AUG.ENABLED:
        test = lambda: trainer.test_with_augmentation(cfg, trainer.model)  # noqa: E731
        trainer.register_hooks([hooks.EvalHook(0, test)])
    with exit_on_error(TrainingError):
        return trainer.train()


def evaluate(cfg: CfgNode, resume: bool) -> Any:
    """Evaluate, and check the results against ``TEST.EXPECTED_RESULTS``; return them.

    Args:
        cfg: Config from `setup`.
        resume: Whether to evaluate the last checkpoint, if there is one, not ``MODEL.WEIGHTS``.
    """
    with exit_on_error():
        model = Trainer.build_model(cfg)
        checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    with exit_on_error(TrainingError):
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_augmentation(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
