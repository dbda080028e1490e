"""Training and evaluation with detectron2's own engine, and the checks that come before."""

from .own_data import argument_parser, check_data
from .pictures import PictureError
from .setup import check_dataset, one_sentence_errors, setup
from .trainer import Trainer

__all__ = [
    "PictureError",
    "Trainer",
    "argument_parser",
    "check_data",
    "check_dataset",
    "one_sentence_errors",
    "setup",
]
