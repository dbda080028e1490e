"""``nonlocal-det lazy-train``: train and evaluate a LazyConfig, with detectron2's flags."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Optional

from detectron2.engine import default_argument_parser

from ..checkpoint.atomic_checkpoint import AtomicCheckpointer
from ..engine.defaults import load_and_check_lazy_cfg, setup_lazy
from ..engine.launch import launch
from ..engine.lazy_trainer import LazyTrainer
from ..errors import TrainingError, exit_on_error
from . import program_name


def parse_args(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Parse detectron2's flags; overrides are KEY=VALUE."""
    parser = default_argument_parser()
    parser.prog = program_name("lazy-train")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, or evaluate (``--eval-only``).

    Args:
        argv: Command line without the program's name; by default that of this process.

    Returns:
        Exit code.
    """
    args = parse_args(argv)
    launch(run, args, lambda: load_and_check_lazy_cfg(args).device)
    return 0


def run(args: Namespace) -> Any:
    """Train or evaluate in one of the run's processes; return the results."""
    with exit_on_error():
        cfg = setup_lazy(args)
        if args.eval_only:
            model = LazyTrainer.build_model(cfg)
            checkpointer = AtomicCheckpointer(model, cfg.train.output_dir)
            checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        else:
            trainer = LazyTrainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    with exit_on_error(TrainingError):
        return LazyTrainer.test(cfg, model) if args.eval_only else trainer.train()
