"""Training and evaluation with detectron2's own engine, and the checks that come before."""

from .processes import for_all_processes, launch
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
from .trainer import Trainer

__all__ = [
    "Step",
    "Trainer",
    "check_batch",
    "check_dataset",
    "checked_config",
    "device_of",
    "for_all_processes",
    "launch",
    "mixed_precision",
    "one_sentence_errors",
    "process_count",
    "say_device",
    "setup",
]
