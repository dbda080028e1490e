"""Training and evaluation with detectron2's engine, and the checks that precede a run."""

from ..checkpoint.atomic_checkpoint import AtomicCheckpointer
from ..errors import TrainingError, exit_on_error
from ..utils.deprecation import renamed_attributes
from .dataset_check import run_dataset_check
from .defaults import load_and_check_cfg, nonlocal_argument_parser, setup
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

__getattr__ = renamed_attributes(
    __name__,
    {
        "Step": "GradAccumTrainer",
        "RunFailure": "TrainingError",
        "WholeCheckpointer": "AtomicCheckpointer",
        "argument_parser": "nonlocal_argument_parser",
        "check_data": "run_dataset_check",
        "check_dataset": "check_dataset_registered",
        "checked_config": "load_and_check_cfg",
        "for_all_processes": "wrap_ddp",
        "one_sentence_errors": "exit_on_error",
    },
)
