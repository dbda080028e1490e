"""What can be seen before a run starts: all that would stop it once it has begun to write."""

from __future__ import annotations

import difflib
import logging
import os
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.file_io import PathManager

from ..checkpoint.detection_checkpoint import LoadReport, NonLocalCheckpointer
from ..errors import summarize_error
from ..utils.file_io import ensure_writable_dir
from ..utils.validation import check_positive_int
from .custom_data import TRAIN, VAL
from .launch import world_size_of
from .train_loop import resolve_amp_dtype
from .trainer import Trainer


def preflight_check(cfg: CfgNode, args: Namespace, device: str) -> None:
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
        _check_solver(cfg, world_size_of(args), device)
    model = build_on_meta_device(cfg)
    _build_solver(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        _check_augmentation(cfg, model)
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if not (args.resume and os.path.exists(last)):
        check_weights(cfg.MODEL.WEIGHTS, model, require_complete=args.eval_only)
    ensure_writable_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")


def _check_solver(cfg: CfgNode, processes: int, device: str) -> None:
    solver = cfg.SOLVER
    check_positive_int("SOLVER.MAX_ITER", solver.MAX_ITER)
    if solver.AMP.ENABLED:
        resolve_amp_dtype("SOLVER.AMP.DTYPE", solver.AMP.DTYPE, device)
    pictures = Trainer.auto_scale_workers(cfg, processes).SOLVER.IMS_PER_BATCH
    passes = {"SOLVER.ACCUMULATION_STEPS": solver.ACCUMULATION_STEPS}
    check_batch_size({"SOLVER.IMS_PER_BATCH": pictures}, passes, processes)


def _build_solver(cfg: CfgNode, model: nn.Module) -> None:
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


def check_batch_size(pictures: dict[str, int], passes: dict[str, int], processes: int) -> None:
    """See that a step's pictures can be divided between processes and their passes.

    Args:
        pictures: their number, under its key.
        passes: the number of each process's passes, under its key.
        processes: on all machines.

    Raises:
        ValueError: with the numbers, if not.
    """
    (key, total), (pass_key, each) = *pictures.items(), *passes.items()
    check_positive_int(key, total)
    check_positive_int(pass_key, each)
    if total % (processes * each):
        raise ValueError(
            f"{key} is {total}; it must be a multiple of {processes * each}, the number of "
            f"processes, {processes}, times {pass_key}, {each}."
        )


def check_dataset_registered(name: str) -> None:
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


def check_device(name: str, key: str = "MODEL.DEVICE") -> None:
    """See that a device is there.

    Raises:
        ValueError: if not.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        have = ", ".join(["'cpu'", *(f"'cuda:{gpu}'" for gpu in range(gpus))])
        raise ValueError(
            f"{key} is {name!r}, which is not on this machine; there is {have}."
        ) from error


def check_inference_cfg(cfg: CfgNode) -> None:
    """See that a model can be built, and that its weights make it whole, on a device that is there.

    Raises:
        FileNotFoundError: if there are no such weights.
        ValueError: if anything else will not do.
    """
    check_device(cfg.MODEL.DEVICE)
    check_weights(cfg.MODEL.WEIGHTS, build_on_meta_device(cfg), require_complete=True)


def build_on_meta_device(cfg: CfgNode) -> nn.Module:
    """Build a configuration's model, without the memory for it.

    Raises:
        ValueError: with what keeps detectron2 from building it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    # A model that reads numbers of its own while it is built needs them: it is built for real.
    for cfg.MODEL.DEVICE in ("meta", "cpu"):
        try:
            with torch.device(cfg.MODEL.DEVICE), _quietly():
                return build_model(cfg)
        except ValueError:
            raise
        except Exception as error:
            failure = error
    frames = traceback.extract_tb(failure.__traceback__)
    where = [frame for frame in frames if f"{os.sep}detectron2{os.sep}" in frame.filename][-1:]
    place = f", at `{where[0].line}` in {os.path.basename(where[0].filename)}" if where else ""
    raise ValueError(
        f"The model of this configuration cannot be built: {summarize_error(failure)}{place}."
    ) from failure


def check_weights(path: str, model: nn.Module, *, require_complete: bool) -> None:
    """See that a checkpoint on this machine can be read and fits a model.

    Args:
        path: ``MODEL.WEIGHTS``; an address elsewhere is left to the run.
        model: loads it, so far as it has memory.
        require_complete: whether the model must be whole afterwards, but for new blocks.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, if nothing of it fits, or if the model would not be whole.
    """
    if not path or "://" in path:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS is {path!r}, which is not a file.")
    with _quietly():
        report = _load(path, model)
    # torch makes up the counters where a checkpoint has none.
    if all(name.endswith("num_batches_tracked") for name in report.loaded):
        raise ValueError(
            f"Nothing of MODEL.WEIGHTS {path!r} fits this model, by name and shape: it is of "
            f"another model ({_few(report.unexpected_keys | report.incorrect_shapes)}); this one "
            f"has "
            f"{_few(model.state_dict().keys())}"
        )
    lacking = [*report.incorrect_shapes, *report.missing_keys]
    if require_complete and lacking:
        raise ValueError(
            f"MODEL.WEIGHTS {path!r} is of another model: {len(lacking)} tensors of this model are "
            f"not in it, or of another shape ({_few(lacking)}), and evaluating random ones means "
            f"nothing."
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
def _quietly() -> Iterator[None]:
    """What is said here will be said again by the run."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") or "nothing"
