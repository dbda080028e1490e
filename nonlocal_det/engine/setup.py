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
    cfg.SEED = choose_seed(cfg.SEED, cfg.OUTPUT_DIR, args)
    cfg.freeze()
    begin(cfg, args, cfg.OUTPUT_DIR, cfg.SEED, moved=asked != device)
    own.finish(cfg)
    return cfg


def begin(cfg: Any, args: Namespace, folder: str, seed: int, *, moved: bool) -> None:
    """Make the output folder, start detectron2's log and draws, and record a start of training.

    Args:
        cfg: a configuration, of either kind, with all that is decided by now.
        args: detectron2's standard arguments.
        folder: for output.
        seed: of all draws.
        moved: whether it runs on another device than asked for.
    """
    default_setup(cfg, args)
    if not args.eval_only:
        add_to_record(folder, seed=seed, resume=args.resume)
    if moved:
        logging.getLogger("detectron2").info("No GPU was found: this runs on the CPU.")


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
