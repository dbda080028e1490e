"""What comes before a run: its configuration, checked, and wrong input said in one sentence."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..modeling.places import check_positions
from .checks import check_run
from .own_data import TRAIN, VAL, own_data


@contextmanager
def one_sentence_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with what a wrong input raised, as one sentence, and exit code 1.

    Args:
        kinds: of errors that speak for themselves; by default ValueError and OSError.
    """
    said_in_one = kinds or (ValueError, OSError)
    try:
        yield
    except said_in_one as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")


def setup(args: Namespace) -> CfgNode:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        FileNotFoundError: for a missing configuration or dataset.
        ValueError: for a key, a value, a position or a dataset name that does not exist.
    """
    cfg = load_config(args.config_file, args.opts)
    own = own_data(cfg, args)
    own.configure(cfg)
    check_positions(cfg)
    if not own.reports:
        for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
            check_dataset(name)
    on_cpu = cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available()
    if on_cpu:
        cfg.MODEL.DEVICE = "cpu"
    check_run(cfg, args)
    cfg.freeze()
    default_setup(cfg, args)
    own.finish(cfg)
    if on_cpu:
        logging.getLogger("detectron2").info("No GPU was found: this runs on the CPU.")
    return cfg


def check_dataset(name: str) -> None:
    """See that a dataset is registered and its files are there.

    Raises:
        ValueError: if no dataset has that name.
        FileNotFoundError: with the file or folder that is missing.
    """
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=4, cutoff=0.4)
        hint = f" The nearest names are {', '.join(near)}." if near else ""
        if name in (TRAIN, VAL):
            hint = " It is that of your own data: give --train-json and --val-json again."
        raise ValueError(f"There is no dataset {name!r}.{hint}")
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root"):
        path = metadata.get(key)
        if path and not os.path.exists(PathManager.get_local_path(path)):
            raise FileNotFoundError(
                f"Dataset {name!r} needs {path!r}, which does not exist. The folder that holds all "
                f"datasets is given by the environment variable DETECTRON2_DATASETS, now "
                f"{os.environ.get('DETECTRON2_DATASETS', 'datasets')!r}."
            )
