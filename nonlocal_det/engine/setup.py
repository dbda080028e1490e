"""What comes before a run: its configuration, checked."""

from __future__ import annotations

import difflib
import logging
import os
from argparse import Namespace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..layers.base import check_count
from ..modeling.places import check_positions
from .processes import device_of, process_count
from .record import add_to_record, choose_seed
from .step import mixed_precision


def setup(args: Namespace) -> CfgNode:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        FileNotFoundError, ValueError: as `checked_config`.
        ValueError: for a record of earlier starts that cannot be read.
    """
    cfg, device = checked_config(args)
    asked, cfg.MODEL.DEVICE = cfg.MODEL.DEVICE, device
    if not args.eval_only:
        cfg.SEED = choose_seed(cfg.SEED, cfg.OUTPUT_DIR, args.resume)
    cfg.freeze()
    default_setup(cfg, args)
    if not args.eval_only:
        add_to_record(cfg.OUTPUT_DIR, seed=cfg.SEED, resume=args.resume)
    say_device(asked, device)
    return cfg


def checked_config(args: Namespace) -> tuple[CfgNode, str]:
    """The configuration, and the device that it is to run on; nothing is written.

    Raises:
        FileNotFoundError: for a missing configuration or dataset.
        ValueError: for a key, a value, a position or a dataset name that does not exist; for a
            batch that cannot be divided; for processes that cannot be started.
    """
    cfg = load_config(args.config_file, args.opts)
    check_positions(cfg)
    for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        check_dataset(name)
    device = device_of(cfg.MODEL.DEVICE, "MODEL.DEVICE cpu", args)
    solver = cfg.SOLVER
    if solver.AMP.ENABLED:
        mixed_precision("SOLVER.AMP.DTYPE", solver.AMP.DTYPE, device)
    if not args.eval_only:
        pictures = DefaultTrainer.auto_scale_workers(cfg, process_count(args)).SOLVER.IMS_PER_BATCH
        passes = {"SOLVER.ACCUMULATION_STEPS": solver.ACCUMULATION_STEPS}
        check_batch({"SOLVER.IMS_PER_BATCH": pictures}, passes, process_count(args))
    return cfg, device


def check_batch(pictures: dict[str, int], passes: dict[str, int], processes: int) -> None:
    """See that a step's pictures can be divided between processes and their passes.

    Args:
        pictures: their number, under its key.
        passes: the number of each process's passes, under its key.
        processes: on all machines.

    Raises:
        ValueError: with the numbers, if not.
    """
    (key, total), (pass_key, each) = *pictures.items(), *passes.items()
    check_count(pass_key, each)
    if total % (processes * each):
        raise ValueError(
            f"{key} is {total}; it must be a multiple of {processes * each}, the number of "
            f"processes, {processes}, times {pass_key}, {each}."
        )


def say_device(asked: str, device: str) -> None:
    """Log that it is another device than asked for."""
    if asked != device:
        logging.getLogger("detectron2").info("No GPU was found: this runs on the CPU.")


def check_dataset(name: str) -> None:
    """See that a dataset is registered and its files are there.

    Raises:
        ValueError: if no dataset has that name.
        FileNotFoundError: with the file or folder that is missing.
    """
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=4, cutoff=0.4)
        raise ValueError(f"There is no dataset {name!r}. The nearest names are {', '.join(near)}.")
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root"):
        path = metadata.get(key)
        if path and not os.path.exists(PathManager.get_local_path(path)):
            raise FileNotFoundError(
                f"Dataset {name!r} needs {path!r}, which does not exist. The folder that holds all "
                f"datasets is given by the environment variable DETECTRON2_DATASETS, now "
                f"{os.environ.get('DETECTRON2_DATASETS', 'datasets')!r}."
            )
