"""What comes before a run: its configuration, checked."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.engine import default_setup

from ..config import load_config
from ..modeling.places import check_positions
from .checks import check_dataset, check_run
from .own_data import OwnData, own_data
from .processes import device_of
from .record import add_to_record, choose_seed


class Checked(NamedTuple):
    """A configuration, the device to run on, and the datasets that the command line names."""

    cfg: Any
    device: str
    own: OwnData = OwnData({})


def setup(args: Namespace) -> CfgNode:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        OSError, ValueError: as `checked_config`.
        ValueError: for a record of earlier starts that cannot be read.
    """
    cfg, device, own = checked_config(args)
    asked, cfg.MODEL.DEVICE = cfg.MODEL.DEVICE, device
    if not args.eval_only:
        cfg.SEED = choose_seed(cfg.SEED, cfg.OUTPUT_DIR, args.resume)
    cfg.freeze()
    default_setup(cfg, args)
    own.finish(cfg)
    if not args.eval_only:
        add_to_record(cfg.OUTPUT_DIR, seed=cfg.SEED, resume=args.resume)
    say_device(asked, device)
    return cfg


def checked_config(args: Namespace) -> Checked:
    """All that can be known to be wrong before anything is written.

    Raises:
        OSError: for a configuration, a dataset or weights that are missing, or an output folder
            that cannot be written to.
        ValueError: for a key, a value, a position or a dataset name that does not exist; for data,
            a model or weights that will not do; for a batch that cannot be divided; for processes
            that cannot be started.
    """
    cfg = load_config(args.config_file, args.opts)
    device = device_of(cfg.MODEL.DEVICE, "MODEL.DEVICE cpu", args)
    own = own_data(cfg, args)
    own.configure(cfg)
    check_positions(cfg)
    if not own.reports:
        for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
            check_dataset(name)
    check_run(cfg, args, device)
    return Checked(cfg, device, own)


def say_device(asked: str, device: str) -> None:
    """Log that it is another device than asked for."""
    if asked != device:
        logging.getLogger("detectron2").info("No GPU was found: this runs on the CPU.")
