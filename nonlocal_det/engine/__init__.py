"""Training and evaluation with detectron2's own engine, and the checks that come before."""

from .checkpoint import WholeCheckpointer
from .failure import TrainingFailure, one_sentence_errors
from .processes import for_all_processes, launch
from .setup import check_dataset, checked_config, setup
from .step import Step
from .trainer import Trainer

__all__ = [
    "Step",
    "Trainer",
    "TrainingFailure",
    "WholeCheckpointer",
    "check_dataset",
    "checked_config",
    "for_all_processes",
    "launch",
    "one_sentence_errors",
    "setup",
]
