"""Checks of one model before it runs: its device, its config, and the weights that it loads."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Callable

import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from ..checkpoint.detection_checkpoint import LoadReport, NonLocalCheckpointer
from ..checkpoint.safe_load import UnsafeWeightsError
from ..errors import in_user_code, summarize_error
from ..modeling.supported_positions import check_positions


def check_device(name: str, key: str = "MODEL.DEVICE") -> None:
    """Check that a device is available.

    Args:
        name: Name of the device, such as "cuda:0".
        key: Config key of the device, for the error message.

    Raises:
        ValueError: If the device is not available; the message lists those that are.
    """
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.zeros(1, device=device)
        elif (device.index or 0) >= gpus:  # without a tensor there, which would cost GPU memory
            raise RuntimeError
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ", ".join(["'cpu'", *(f"'cuda:{gpu}'" for gpu in range(gpus))])
        raise ValueError(
            f"{key} is {name!r}, which is not available on this machine; available: {available}."
        ) from error


def prepare_inference_cfg(cfg: CfgNode) -> None:
    """Select the CPU where there is no GPU; check positions, device, model and weights.

    Args:
        cfg: Config for inference, changed in place.

    Raises:
        FileNotFoundError: If the weights do not exist.
        ValueError: If the device is not available, the model cannot be built, or its weights do
            not fit it.
    """
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_positions(cfg)
    check_device(cfg.MODEL.DEVICE)
    model = build_on_meta_device(cfg)
    if cfg.MODEL.WEIGHTS:  # a model with random weights can be exported and drawn, too
        check_weights(cfg.MODEL.WEIGHTS, model, require_complete=True)


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

    def build(device: str) -> nn.Module:
        cfg.MODEL.DEVICE = device
        return build_model(cfg)

    return without_memory(build)


def without_memory(build: Callable[[str], nn.Module]) -> nn.Module:
    """Build a model on the meta device or, where that cannot be, on the CPU.

    Args:
        build: Function that builds the model on a device.

    Raises:
        ValueError: If detectron2 cannot build the model; the message gives the cause. An error in
            the user's own code is raised as it is.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), _silenced():
                return build(device)
        except ValueError:
            raise
        except Exception as error:
            failure = error
    if in_user_code(failure):
        raise failure
    frames = traceback.extract_tb(failure.__traceback__)
    where = [frame for frame in frames if f"{os.sep}detectron2{os.sep}" in frame.filename][-1:]
    line = f", at `{where[0].line}` in {os.path.basename(where[0].filename)}" if where else ""
    raise ValueError(
        f"The model of this configuration cannot be built: {summarize_error(failure)}{line}."
    ) from failure


def check_weights(
    path: str, model: nn.Module, *, require_complete: bool, key: str = "MODEL.WEIGHTS"
) -> None:
    """Check that a local checkpoint can be read and matches a model.

    Args:
        path: Path of the checkpoint; a URL is not checked.
        model: Model that the checkpoint is loaded into, as far as it has memory.
        require_complete: Whether there must be a checkpoint, with all tensors except those of new
            blocks.
        key: Config key of the path, for the error message.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, if none of its tensors matches, or if tensors are missing
            that are required.
    """
    if require_complete and not path:
        raise ValueError(
            f"{key} is empty, so the model would have randomly initialized weights; it must be a "
            f"checkpoint."
        )
    if not path or "://" in path:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{key} is {path!r}, which is not a file.")
    report, _ = load_silently(path, model, key)
    if not report.loaded:
        raise ValueError(
            f"No tensor in {key} {path!r} matches this model by name and shape. The "
            f"checkpoint has {_excerpt(report.unexpected_keys | report.incorrect_shapes)}; the "
            f"model expects {_excerpt(model.state_dict().keys())}."
        )
    lacking = [*report.incorrect_shapes, *report.missing_keys]
    if require_complete and lacking:
        raise ValueError(
            f"{key} {path!r} does not match this model: {len(lacking)} tensors are missing "
            f"or have another shape ({_excerpt(lacking)}). Evaluation would use randomly "
            f"initialized weights."
        )


def load_silently(path: str, model: nn.Module, key: str) -> tuple[LoadReport, dict[str, Any]]:
    """Load a checkpoint into a model; nothing is logged, for the run does it again.

    Args:
        path: Path of the checkpoint.
        model: Model to load it into.
        key: Config key of the path, for the error message.

    Returns:
        Report on its tensors, and its other contents.

    Raises:
        ValueError: If it cannot be read.
    """
    checkpointer = NonLocalCheckpointer(model, save_to_disk=False)
    try:
        with _silenced():
            rest = checkpointer.load(path, checkpointables=[])
        return checkpointer.load_report, rest
    except UnsafeWeightsError:
        raise
    except Exception as error:  # pickle and torch raise errors of any kind
        raise ValueError(
            f"{key} {path!r} cannot be read as a checkpoint of torch (.pth) or of "
            f"detectron2 (.pkl): {summarize_error(error)}."
        ) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress logs and warnings within the body; the run repeats them, or an error says it."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _excerpt(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") or "nothing"
