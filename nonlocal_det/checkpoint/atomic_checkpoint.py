"""Checkpoints that are whole at any moment, and resuming from the last of them."""

from __future__ import annotations

import os
import re
import zipfile
from typing import IO, Any

import detectron2.utils.comm as comm
import torch
import torch.nn as nn
from detectron2.utils.file_io import PathManager

from ..utils.file_io import atomic_write, remove_stale_temp_files
from .detection_checkpoint import NonLocalCheckpointer


class AtomicCheckpointer(NonLocalCheckpointer):
    """detectron2's checkpointer, safe against a program that ends at any moment.

    A checkpoint, and ``last_checkpoint``, which names the last one, is replaced in one step by a
    file that is on the disk already. Weights that are not finite are not saved.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = _AtomicPathManager()

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as ``<name>.pth``, and name it in ``last_checkpoint``.

        Raises:
            FloatingPointError: if a weight is not finite.
            OSError: if the disk is full.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        wrong = nonfinite_parameters(self.model)
        if wrong:
            raise FloatingPointError(
                f"{name}.pth was not written: weights are not finite, {wrong[0]} for one, though "
                f"the losses were."
            )
        remove_stale_temp_files(self.save_dir)  # only one process saves: it is alone here
        super().save(name, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As detectron2's; where the last checkpoint is damaged, from the newest that is whole.

        Raises:
            OSError: if there are checkpoints, and none of them is whole.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        # One process looks, for all must take the same.
        found = comm.all_gather(self._latest_intact() if comm.is_main_process() else "")[0]
        if not found:
            raise OSError(
                f"--resume finds no whole checkpoint in {self.save_dir!r}: "
                f"{self.get_checkpoint_file()!r} is damaged or missing, and so are all others. "
                f"Bring one back, or start anew without --resume."
            )
        return self.load(found)

    def _latest_intact(self) -> str:
        named = self.get_checkpoint_file()
        if is_intact(named):
            return named
        ours = re.compile(r"model_(\d+|final)\.pth")
        files = self.get_all_checkpoint_files()
        saved = [file for file in files if ours.fullmatch(os.path.basename(file))]
        for file in sorted(saved, key=os.path.getmtime, reverse=True):
            if is_intact(file):
                self.logger.warning(
                    f"The last checkpoint, {named}, is damaged or missing: training goes on from "
                    f"{file}, the newest that is whole."
                )
                return file
        return ""


class _AtomicPathManager:
    """detectron2's PathManager, except that local files are written whole."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **options: Any) -> IO[Any]:
        if "w" in mode and os.path.isdir(os.path.dirname(path) or "."):
            return atomic_write(path, mode)
        return PathManager.open(path, mode, **options)


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """The names of parameters that hold an infinity or a NaN."""
    return [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]


def is_intact(path: str) -> bool:
    """Whether a checkpoint is all there, by the checksums in it, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # a damaged header may say, and then raise, anything
        return False
