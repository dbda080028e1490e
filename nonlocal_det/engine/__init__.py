"""Training and evaluation with detectron2's own engine, and the checks that come before."""

from ..checkpoint.atomic_checkpoint import AtomicCheckpointer
from ..errors import TrainingError, exit_on_error
from .custom_data import nonlocal_argument_parser, run_dataset_check
from .defaults import load_and_check_cfg, setup
from .launch import launch, wrap_ddp
from .preflight import check_dataset_registered
from .train_loop import GradAccumTrainer
from .trainer import Trainer

__all__ = [
    "GradAccumTrainer",
    "Trainer",
    "TrainingError",
    "AtomicCheckpointer",
    "nonlocal_argument_parser",
    "run_dataset_check",
    "check_dataset_registered",
    "load_and_check_cfg",
    "wrap_ddp",
    "launch",
    "exit_on_error",
    "setup",
]
