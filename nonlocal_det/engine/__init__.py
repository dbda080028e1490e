"""Training and evaluation with detectron2's own engine, and the checks that come before."""

from .setup import check_dataset, one_sentence_errors, setup
from .trainer import Trainer

__all__ = ["Trainer", "check_dataset", "one_sentence_errors", "setup"]
