"""The checkpoints of an output directory, and the one to resume from."""

from __future__ import annotations

import os
import re
import zipfile

import torch

TAG_FILE = "last_checkpoint"  # fvcore's; it holds the name of the checkpoint that was saved last
_SAVED = re.compile(r"model_(\d+|final)\.pth")


def saved_checkpoints(folder: str) -> list[str]:
    """Return the paths of all checkpoints that training has saved in a directory, intact or not."""
    if not os.path.isdir(folder):
        return []
    return [os.path.join(folder, name) for name in os.listdir(folder) if _SAVED.fullmatch(name)]


def has_checkpoints(folder: str) -> bool:
    """Whether training has saved checkpoints in a directory, even if none is left."""
    return os.path.exists(os.path.join(folder, TAG_FILE)) or bool(saved_checkpoints(folder))


def tagged_checkpoint(folder: str) -> str:
    """Return the path of the checkpoint that ``last_checkpoint`` names; "" if there is none."""
    try:
        with open(os.path.join(folder, TAG_FILE), encoding="utf-8", errors="replace") as file:
            name = file.read().strip()
    except OSError:
        return ""
    return os.path.join(folder, name) if name else ""


def latest_checkpoint(folder: str) -> str:
    """Return the path of the checkpoint to resume from; "" if none is intact.

    That is the one that ``last_checkpoint`` names, or one that was saved after that file was
    written, for a run may be killed between the two. Without either, it is the intact one of the
    latest iteration.
    """
    tagged = tagged_checkpoint(folder)
    saved = sorted(saved_checkpoints(folder), key=_age, reverse=True)
    if is_intact(tagged):
        written = os.path.getmtime(os.path.join(folder, TAG_FILE))
        if os.path.getmtime(tagged) > written:  # copied without its time, which says nothing then
            return tagged
        saved = [path for path in saved if os.path.getmtime(path) > written]
        saved = [path for path in saved if _age(path) > _age(tagged)] + [tagged]
    return next(filter(is_intact, saved), "")


def _age(path: str) -> tuple[int, float]:
    """Iteration and time of a checkpoint; the greater, the later."""
    number = os.path.splitext(path)[0].rpartition("_")[2]
    iteration = int(number) if number.isdecimal() else _saved_iteration(path)
    return iteration, os.path.getmtime(path)


def _saved_iteration(path: str) -> int:
    """Return the iteration that a checkpoint holds, without reading its tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iteration"]
    except Exception:  # a corrupt file can raise anything
        return -1


def is_intact(path: str) -> bool:
    """Whether a checkpoint is complete and undamaged, by its checksums, which torch ignores."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # a corrupt header can raise anything
        return False
