"""Preflight checks: detect, before anything is written, what would stop a run later."""

from __future__ import annotations

import difflib
import logging
import os
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Union

import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

from ..checkpoint.detection_checkpoint import LoadReport, NonLocalCheckpointer
from ..errors import summarize_error
from ..modeling.supported_positions import check_positions
from ..utils.file_io import ensure_writable_dir
from ..utils.validation import check_positive_int
from .custom_data import TRAIN, VAL
from .train_loop import resolve_amp_dtype
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
    check_device(device)
    if not eval_only:
        _check_solver(cfg, world_size, device)
    model = build_on_meta_device(cfg)
    _check_schedule(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        _check_augmentation(cfg, model)
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if not (resume and os.path.exists(last)):
        check_weights(cfg.MODEL.WEIGHTS, model, require_complete=eval_only)
    ensure_writable_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")


def preflight_check_lazy(
    cfg: DictConfig, device: str, world_size: int, *, eval_only: bool = False
) -> None:
    """Check that training or evaluation with a LazyConfig can start, except for its model.

    Args:
        cfg: Config of the run.
        device: Device to run on.
        world_size: Number of processes on all machines.
        eval_only: Whether the run only evaluates.

    Raises:
        OSError: If a dataset is missing or the output directory is not writable.
        ValueError: If a setting is not valid.
    """
    train, data = cfg.train, cfg.dataloader
    for loader in (data.test,) if eval_only else (data.train, data.test):
        for name in _as_list(loader.dataset.names):
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
    ensure_writable_dir(train.output_dir, "train.output_dir")


def _as_list(names: Union[str, Iterable[str]]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_solver(cfg: CfgNode, world_size: int, device: str) -> None:
    solver = cfg.SOLVER
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


def _check_schedule(cfg: CfgNode, model: nn.Module) -> None:
    """Check that optimizer and learning rate schedule can be built."""
    optimizer = Trainer.build_optimizer(cfg, model)
    try:
        Trainer.build_lr_scheduler(cfg, optimizer)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"The schedule of SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME!r}, STEPS "
            f"{cfg.SOLVER.STEPS} and MAX_ITER {cfg.SOLVER.MAX_ITER} cannot be built: "
            f"{summarize_error(error)}."
        ) from error


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
        FileNotFoundError: If its annotation file or image root is missing.
    """
    if name not in DatasetCatalog.list():
        similar = difflib.get_close_matches(name, DatasetCatalog.list(), n=4, cutoff=0.4)
        hint = f" The nearest names are {', '.join(similar)}." if similar else ""
        if name in _CUSTOM_DATASETS:
            hint = " It was given on the command line: pass --train-json and --val-json again."
        raise ValueError(f"There is no dataset {name!r}.{hint}")
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root"):
        path = metadata.get(key)
        if path and not os.path.exists(PathManager.get_local_path(path)):
            raise FileNotFoundError(
                f"Dataset {name!r} needs {path!r}, which does not exist. The directory of all "
                f"datasets is given by the environment variable DETECTRON2_DATASETS, now "
                f"{os.environ.get('DETECTRON2_DATASETS', 'datasets')!r}."
            )


def check_device(name: str, key: str = "MODEL.DEVICE") -> None:
    """Check that a device is available.

    Args:
        name: Name of the device, such as "cuda:0".
        key: Config key of the device, for the error message.

    Raises:
        ValueError: If the device is not available; the message lists those that are.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        available = ", ".join(["'cpu'", *(f"'cuda:{gpu}'" for gpu in range(gpus))])
        raise ValueError(
            f"{key} is {name!r}, which is not available on this machine; available: {available}."
        ) from error


def check_inference_cfg(cfg: CfgNode) -> None:
    """Check that a config's device is available, its model can be built, and its weights fit it.

    Args:
        cfg: Config for inference.

    Raises:
        FileNotFoundError: If the weights do not exist.
        ValueError: If anything else is not valid.
    """
    check_device(cfg.MODEL.DEVICE)
    check_weights(cfg.MODEL.WEIGHTS, build_on_meta_device(cfg), require_complete=True)


def build_on_meta_device(cfg: CfgNode) -> nn.Module:
    """Build a config's model without allocating memory for its parameters.

    A model that reads tensor values while it is built is built on the CPU.

    Args:
        cfg: Config of the model.

    Raises:
        ValueError: If detectron2 cannot build the model; the message gives the cause.
    """
    cfg = cfg.clone()
    cfg.defrost()
    for cfg.MODEL.DEVICE in ("meta", "cpu"):
        try:
            with torch.device(cfg.MODEL.DEVICE), _silenced():
                return build_model(cfg)
        except ValueError:
            raise
        except Exception as error:
            failure = error
    frames = traceback.extract_tb(failure.__traceback__)
    where = [frame for frame in frames if f"{os.sep}detectron2{os.sep}" in frame.filename][-1:]
    line = f", at `{where[0].line}` in {os.path.basename(where[0].filename)}" if where else ""
    raise ValueError(
        f"The model of this configuration cannot be built: {summarize_error(failure)}{line}."
    ) from failure


def check_weights(path: str, model: nn.Module, *, require_complete: bool) -> None:
    """Check that a local checkpoint can be read and matches a model.

    Args:
        path: Path of the checkpoint, ``MODEL.WEIGHTS``; a URL is not checked.
        model: Model that the checkpoint is loaded into, as far as it has memory.
        require_complete: Whether the checkpoint must have all tensors except those of new blocks.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, if none of its tensors matches, or if tensors are missing
            that are required.
    """
    if not path or "://" in path:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS is {path!r}, which is not a file.")
    with _silenced():
        report = _load(path, model)
    # torch adds these counters where a checkpoint has none.
    if all(name.endswith("num_batches_tracked") for name in report.loaded):
        raise ValueError(
            f"No tensor in MODEL.WEIGHTS {path!r} matches this model by name and shape. The "
            f"checkpoint has {_excerpt(report.unexpected_keys | report.incorrect_shapes)}; the "
            f"model expects {_excerpt(model.state_dict().keys())}."
        )
    lacking = [*report.incorrect_shapes, *report.missing_keys]
    if require_complete and lacking:
        raise ValueError(
            f"MODEL.WEIGHTS {path!r} does not match this model: {len(lacking)} tensors are missing "
            f"or have another shape ({_excerpt(lacking)}). Evaluation would use randomly "
            f"initialized weights."
        )


def _load(path: str, model: nn.Module) -> LoadReport:
    checkpointer = NonLocalCheckpointer(model, save_to_disk=False)
    try:
        checkpointer.load(path, checkpointables=[])
        return checkpointer.load_report
    except Exception as error:  # pickle and torch raise errors of any kind
        raise ValueError(
            f"MODEL.WEIGHTS {path!r} cannot be read as a checkpoint of torch (.pth) or of "
            f"detectron2 (.pkl): {summarize_error(error)}."
        ) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress logs and warnings within the body: the run will repeat them."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _excerpt(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") or "nothing"
