"""What can be seen before a model is used: its device is there, it builds, its weights fit."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .checkpoint import Fit, NonLocalCheckpointer


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


def check_trained(cfg: CfgNode) -> None:
    """See that a model can be built, and that its weights make it whole, on a device that is there.

    Raises:
        FileNotFoundError: if there are no such weights.
        ValueError: if anything else will not do.
    """
    check_device(cfg.MODEL.DEVICE)
    check_weights(cfg.MODEL.WEIGHTS, build_without_memory(cfg), evaluates=True)


def build_without_memory(cfg: CfgNode) -> nn.Module:
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
        f"The model of this configuration cannot be built: {said_by(failure)}{place}."
    ) from failure


def check_weights(path: str, model: nn.Module, *, evaluates: bool) -> None:
    """See that a checkpoint on this machine can be read and fits a model.

    Args:
        path: ``MODEL.WEIGHTS``; an address elsewhere is left to the run.
        model: loads it, so far as it has memory.
        evaluates: whether the model must be whole afterwards, but for new blocks.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, if nothing of it fits, or if the model would not be whole.
    """
    if not path or "://" in path:
        return
    if not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS is {path!r}, which is not a file.")
    with _quietly():
        fit = _load(path, model)
    # torch makes up the counters where a checkpoint has none.
    if all(name.endswith("num_batches_tracked") for name in fit.loaded):
        raise ValueError(
            f"Nothing of MODEL.WEIGHTS {path!r} fits this model, by name and shape: it is of "
            f"another model ({_few(fit.unexpected | fit.misshaped)}); this one has "
            f"{_few(model.state_dict().keys())}"
        )
    lacking = [*fit.misshaped, *fit.missing]
    if evaluates and lacking:
        raise ValueError(
            f"MODEL.WEIGHTS {path!r} is of another model: {len(lacking)} tensors of this model are "
            f"not in it, or of another shape ({_few(lacking)}), and evaluating random ones means "
            f"nothing."
        )


def _load(path: str, model: nn.Module) -> Fit:
    checkpointer = NonLocalCheckpointer(model, save_to_disk=False)
    try:
        checkpointer.load(path, checkpointables=[])
        return checkpointer.fit
    except Exception as error:  # pickle and torch raise errors of any kind
        raise ValueError(
            f"MODEL.WEIGHTS {path!r} cannot be read as a checkpoint of torch (.pth) or of "
            f"detectron2 (.pkl): {said_by(error)}."
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


def said_by(error: Exception) -> str:
    """An error's kind and its first sentence."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    first = text.strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") or "nothing"
