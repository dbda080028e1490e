"""Training and evaluation with detectron2's own engine, and the checks that come before."""

from .checkpoint import WholeCheckpointer
from .checks import check_dataset
from .failure import RunFailure, one_sentence_errors
from .own_data import argument_parser, check_data
from .processes import for_all_processes, launch
from .setup import checked_config, setup
from .step import Step
from .trainer import Trainer

__all__ = [
    "Step",
    "Trainer",
    "RunFailure",
    "WholeCheckpointer",
    "argument_parser",
    "check_data",
    "check_dataset",
    "checked_config",
    "for_all_processes",
    "launch",
    "one_sentence_errors",
    "setup",
]
