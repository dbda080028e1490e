"""Preflight checks: detect, before anything is written, what would stop a run later."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Collection, Iterable
from typing import Union

import torch
import torch.nn as nn
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

from ..errors import summarize_error
from ..evaluation.evaluators import check_evaluator
from ..modeling.block_factory import check_batch_norms
from ..modeling.supported_positions import check_positions
from ..utils.file_io import ensure_writable_dir
from ..utils.validation import check_int_in, check_positive_int
from .annotation_check import check_annotations
from .custom_data import TRAIN, VAL
from .model_check import build_on_meta_device, check_device, check_weights, without_memory
from .output_dir import check_output_dir
from .resume_check import check_resumable
from .settings_check import check_lazy_train_settings, check_train_settings
from .train_loop import resolve_amp_dtype
from .trained_classes import check_all_classes, check_count
from .trainer import Trainer

# Names of the datasets that --train-json and --val-json give; "own_*" in configs of older runs.
_CUSTOM_DATASETS = (TRAIN, VAL, "own_train", "own_val")


def preflight_check(
    cfg: CfgNode,
    device: str,
    world_size: int,
    *,
    eval_only: bool = False,
    resume: bool = False,
    valid_datasets: Collection[str] = (),
) -> None:
    """Check that training or evaluation with a YAML config can start.

    Args:
        cfg: Config of the run.
        device: Device to run on.
        world_size: Number of processes on all machines.
        eval_only: Whether the run only evaluates.
        resume: Whether the run resumes from its last checkpoint, if there is one.
        valid_datasets: Names of datasets that need no check.

    Raises:
        OSError: If a file or directory is missing or not usable.
        ValueError: If any setting is not valid.
    """
    check_positions(cfg)
    split = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[split]:
        raise ValueError(f"DATASETS.{split} is empty; it must name a dataset.")
    for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        if name not in valid_datasets:
            check_dataset_registered(name)
    for name in cfg.DATASETS.TEST:
        check_evaluator(name, cfg.MODEL.META_ARCHITECTURE)
    check_all_classes(cfg, eval_only=eval_only, resume=resume)
    check_annotations(cfg, eval_only=eval_only)
    check_device(device)
    if not eval_only:
        _check_solver(cfg, world_size, device)
        check_train_settings(cfg, world_size)
    model = build_on_meta_device(cfg)
    if not eval_only:
        images = Trainer.auto_scale_workers(cfg, world_size).SOLVER.IMS_PER_BATCH
        micro_batch = images // (world_size * cfg.SOLVER.ACCUMULATION_STEPS)
        check_batch_norms(model, micro_batch, world_size)
    optimizer = _check_schedule(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        _check_augmentation(cfg, model)
    last = check_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR", eval_only=eval_only, resume=resume)
    if last and not eval_only:
        check_resumable(last, model, optimizer)
    else:
        check_weights(last or cfg.MODEL.WEIGHTS, model, require_complete=eval_only)
    ensure_writable_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")


def preflight_check_lazy(
    cfg: DictConfig,
    device: str,
    world_size: int,
    *,
    eval_only: bool = False,
    resume: bool = False,
) -> None:
    """Check that training or evaluation with a LazyConfig can start.

    Args:
        cfg: Config of the run.
        device: Device to run on.
        world_size: Number of processes on all machines.
        eval_only: Whether the run only evaluates.
        resume: Whether the run resumes from its last checkpoint, if there is one.

    Raises:
        OSError: If a file or directory is missing or not usable.
        ValueError: If any setting is not valid.
    """
    train, data = cfg.train, cfg.dataloader
    flags = {"eval_only": eval_only, "resume": resume}
    last = check_output_dir(train.output_dir, "train.output_dir", **flags)
    loaders = (data.test,) if eval_only else (data.train, data.test)
    datasets = [name for loader in loaders for name in _as_list(loader.dataset.names)]
    for name in datasets:
        check_dataset_registered(name)
    check_device(device, "train.device")
    resolve_amp_dtype(train.amp.enabled, train.amp.dtype, "train.amp.dtype", device)
    if not eval_only:
        check_batch_size(
            data.train.total_batch_size,
            train.accumulation_steps,
            world_size,
            keys=("dataloader.train.total_batch_size", "train.accumulation_steps"),
        )
        check_lazy_train_settings(cfg, world_size)
    model = without_memory(lambda device: instantiate(cfg.model).to(device))
    if last and not eval_only:
        check_resumable(last, model, _build_lazy_optimizer(cfg, model))
    else:
        weights, key = last or train.init_checkpoint, "train.init_checkpoint"
        check_weights(weights, model, require_complete=eval_only, key=key)
    for key in ("model.roi_heads.num_classes", "model.num_classes"):
        count = OmegaConf.select(cfg, key)
        for name in datasets if count is not None else ():
            check_count(key, count, name)
    ensure_writable_dir(train.output_dir, "train.output_dir")


def _build_lazy_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = copy.deepcopy(cfg.optimizer)
    optimizer.params.model = model
    return instantiate(optimizer)


def _as_list(names: Union[str, Iterable[str]]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_solver(cfg: CfgNode, world_size: int, device: str) -> None:
    solver = cfg.SOLVER
    reference = solver.REFERENCE_WORLD_SIZE
    check_int_in("SOLVER.REFERENCE_WORLD_SIZE", reference, 0)
    check_positive_int("SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH)
    if reference and solver.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}; it must be a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE, {reference}."
        )
    images_per_batch = Trainer.auto_scale_workers(cfg, world_size).SOLVER.IMS_PER_BATCH
    check_batch_size(images_per_batch, solver.ACCUMULATION_STEPS, world_size)
    check_positive_int("SOLVER.MAX_ITER", solver.MAX_ITER)
    resolve_amp_dtype(solver.AMP.ENABLED, solver.AMP.DTYPE, "SOLVER.AMP.DTYPE", device)


def check_batch_size(
    images_per_batch: int,
    accumulation_steps: int,
    world_size: int,
    *,
    keys: tuple[str, str] = ("SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATION_STEPS"),
) -> None:
    """Check that a batch can be divided among processes and their micro-batches.

    Args:
        images_per_batch: Number of images per optimizer step, in all processes.
        accumulation_steps: Number of micro-batches per optimizer step in each process.
        world_size: Number of processes on all machines.
        keys: Config keys of the first two, for the error message.

    Raises:
        ValueError: If it cannot; the message gives the numbers.
    """
    check_positive_int(keys[0], images_per_batch)
    check_positive_int(keys[1], accumulation_steps)
    parts = world_size * accumulation_steps
    if images_per_batch % parts:
        raise ValueError(
            f"{keys[0]} is {images_per_batch}; it must be a multiple of {parts}, the number of "
            f"processes, {world_size}, times {keys[1]}, {accumulation_steps}."
        )


def _check_schedule(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Check that optimizer and learning rate schedule can be built; return the optimizer."""
    optimizer = Trainer.build_optimizer(cfg, model)
    try:
        Trainer.build_lr_scheduler(cfg, optimizer)
    except Exception as error:  # TypeError, for steps that are not numbers
        raise ValueError(
            f"The schedule of SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME!r}, STEPS "
            f"{cfg.SOLVER.STEPS} and MAX_ITER {cfg.SOLVER.MAX_ITER} cannot be built: "
            f"{summarize_error(error)}."
        ) from error
    return optimizer


def _check_augmentation(cfg: CfgNode, model: nn.Module) -> None:
    """Check that detectron2's test-time augmentation supports the model."""
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError(
            "TEST.AUG.ENABLED and MODEL.KEYPOINT_ON are both True, but detectron2's test-time "
            "augmentation supports boxes and masks only; set TEST.AUG.ENABLED to False."
        )
    if not isinstance(model, GeneralizedRCNN):
        raise ValueError(
            f"TEST.AUG.ENABLED is True, but detectron2's test-time augmentation supports only "
            f"MODEL.META_ARCHITECTURE 'GeneralizedRCNN', not {cfg.MODEL.META_ARCHITECTURE!r}; set "
            f"TEST.AUG.ENABLED to False."
        )


def check_dataset_registered(name: str) -> None:
    """Check that a dataset is registered and its files exist.

    Args:
        name: Name of the dataset.

    Raises:
        ValueError: If no dataset has that name; the message gives similar names.
        FileNotFoundError: If one of its files or directories is missing.
    """
    if name not in DatasetCatalog.list():
        similar = difflib.get_close_matches(name, DatasetCatalog.list(), n=4, cutoff=0.4)
        hint = f" The nearest names are {', '.join(similar)}." if similar else ""
        if name in _CUSTOM_DATASETS:
            hint = " It was given on the command line: pass --train-json and --val-json again."
        raise ValueError(f"There is no dataset {name!r}.{hint}")
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root", "dirname", "image_dir", "gt_dir", "sem_seg_root"):
        path = metadata.get(key)
        if path and not os.path.exists(PathManager.get_local_path(path)):
            raise FileNotFoundError(
                f"Dataset {name!r} needs {path!r}, which does not exist. The directory of all "
                f"datasets is given by the environment variable DETECTRON2_DATASETS, now "
                f"{os.environ.get('DETECTRON2_DATASETS', 'datasets')!r}."
            )
