"""What comes before a run: its configuration, checked."""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.engine import default_setup

from ..config import load_config
from ..modeling.supported_positions import check_positions
from ..utils.config_files import find_config_file
from .custom_data import CustomDatasets, load_custom_datasets
from .launch import resolve_device
from .preflight import check_dataset_registered, preflight_check
from .run_info import append_run_info, choose_seed


class CheckedCfg(NamedTuple):
    """A configuration, the device to run on, and the datasets that the command line names."""

    cfg: Any
    device: str
    own: CustomDatasets = CustomDatasets({})


def setup(args: Namespace) -> CfgNode:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        OSError, ValueError: as `load_and_check_cfg`.
        ValueError: for a record of earlier starts that cannot be read.
    """
    cfg, device, own = load_and_check_cfg(args)
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
    # detectron2 logs the content of the config file, which may be given by its name in the zoo.
    args.config_file = find_config_file(args.config_file)
    default_setup(cfg, args)
    if not args.eval_only:
        append_run_info(folder, seed=seed, resume=args.resume)
    if moved:
        logging.getLogger("detectron2").info("No GPU was found: this runs on the CPU.")


def load_and_check_cfg(args: Namespace) -> CheckedCfg:
    """All that can be known to be wrong before anything is written.

    Raises:
        OSError: for a configuration, a dataset or weights that are missing, or an output folder
            that cannot be written to.
        ValueError: for a key, a value, a position or a dataset name that does not exist; for data,
            a model or weights that will not do; for a batch that cannot be divided; for processes
            that cannot be started.
    """
    cfg = load_config(args.config_file, args.opts)
    device = resolve_device(cfg.MODEL.DEVICE, "MODEL.DEVICE cpu", args)
    own = load_custom_datasets(cfg, args)
    own.configure(cfg)
    check_positions(cfg)
    if not own.reports:
        for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
            check_dataset_registered(name)
    preflight_check(cfg, args, device)
    return CheckedCfg(cfg, device, own)
