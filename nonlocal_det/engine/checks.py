"""What can be seen before a run starts: all that would stop it once it has begun to write."""

from __future__ import annotations

import difflib
import os
from argparse import Namespace

import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.file_io import PathManager

from ..files import check_folder
from ..layers.base import check_count
from ..modeling.checks import build_without_memory, check_device, check_weights, said_by
from .own_data import TRAIN, VAL
from .processes import process_count
from .step import mixed_precision
from .trainer import Trainer


def check_run(cfg: CfgNode, args: Namespace, device: str) -> None:
    """See that a run can start on a device, before anything is written.

    Raises:
        OSError: if a file or folder is not there, or not what it must be.
        ValueError: if anything else will not do.
    """
    needed = "TEST" if args.eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise ValueError(f"DATASETS.{needed} is empty; it must name a dataset.")
    check_device(device)
    if not args.eval_only:
        _check_solver(cfg, process_count(args), device)
    model = build_without_memory(cfg)
    _build_solver(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        _check_augmentation(cfg, model)
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if not (args.resume and os.path.exists(last)):
        check_weights(cfg.MODEL.WEIGHTS, model, evaluates=args.eval_only)
    check_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")


def _check_solver(cfg: CfgNode, processes: int, device: str) -> None:
    solver = cfg.SOLVER
    check_count("SOLVER.MAX_ITER", solver.MAX_ITER)
    if solver.AMP.ENABLED:
        mixed_precision("SOLVER.AMP.DTYPE", solver.AMP.DTYPE, device)
    pictures = Trainer.auto_scale_workers(cfg, processes).SOLVER.IMS_PER_BATCH
    passes = {"SOLVER.ACCUMULATION_STEPS": solver.ACCUMULATION_STEPS}
    check_batch({"SOLVER.IMS_PER_BATCH": pictures}, passes, processes)


def _build_solver(cfg: CfgNode, model: nn.Module) -> None:
    optimizer = Trainer.build_optimizer(cfg, model)
    try:
        Trainer.build_lr_scheduler(cfg, optimizer)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"The schedule of SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME!r}, STEPS "
            f"{cfg.SOLVER.STEPS} and MAX_ITER {cfg.SOLVER.MAX_ITER} cannot be built: "
            f"{said_by(error)}."
        ) from error


def _check_augmentation(cfg: CfgNode, model: nn.Module) -> None:
    """See that detectron2's test-time augmentation can do with a model."""
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError(
            "TEST.AUG.ENABLED and MODEL.KEYPOINT_ON are both True, and detectron2's test-time "
            "augmentation is for boxes and masks alone; set TEST.AUG.ENABLED to False."
        )
    if not isinstance(model, GeneralizedRCNN):
        raise ValueError(
            f"TEST.AUG.ENABLED is True, and detectron2's test-time augmentation is for "
            f"MODEL.META_ARCHITECTURE 'GeneralizedRCNN', which {cfg.MODEL.META_ARCHITECTURE!r} is "
            f"not; set TEST.AUG.ENABLED to False."
        )


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
    check_count(key, total)
    check_count(pass_key, each)
    if total % (processes * each):
        raise ValueError(
            f"{key} is {total}; it must be a multiple of {processes * each}, the number of "
            f"processes, {processes}, times {pass_key}, {each}."
        )


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
