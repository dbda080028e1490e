"""Training and evaluation with detectron2's own engine, and the checks that come before."""

from .checkpoint import WholeCheckpointer
from .failure import FailureGuard, TrainingFailure
from .processes import for_all_processes, launch
from .record import add_to_record, choose_seed
from .resume import ResumeHook
from .setup import (
    check_batch,
    check_dataset,
    checked_config,
    device_of,
    mixed_precision,
    one_sentence_errors,
    process_count,
    say_device,
    setup,
)
from .step import Step
from .stream import build_training_stream
from .trainer import Trainer

__all__ = [
    "FailureGuard",
    "ResumeHook",
    "Step",
    "Trainer",
    "TrainingFailure",
    "WholeCheckpointer",
    "add_to_record",
    "build_training_stream",
    "check_batch",
    "check_dataset",
    "checked_config",
    "choose_seed",
    "device_of",
    "for_all_processes",
    "launch",
    "mixed_precision",
    "one_sentence_errors",
    "process_count",
    "say_device",
    "setup",
]
