"""Training and evaluation with detectron2's own engine, and the checks that come before."""

from .checkpoint import WholeCheckpointer
from .failure import FailureGuard, TrainingFailure
from .record import add_to_record, choose_seed
from .resume import ResumeHook
from .setup import check_dataset, one_sentence_errors, setup
from .stream import build_training_stream
from .trainer import Trainer

__all__ = [
    "FailureGuard",
    "ResumeHook",
    "Trainer",
    "TrainingFailure",
    "WholeCheckpointer",
    "add_to_record",
    "build_training_stream",
    "check_dataset",
    "choose_seed",
    "one_sentence_errors",
    "setup",
]
