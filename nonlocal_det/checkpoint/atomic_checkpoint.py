"""Atomic writing of checkpoints, and resuming from the latest intact one."""

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
    """`NonLocalCheckpointer` whose files stay intact if the program is killed at any moment.

    A checkpoint and ``last_checkpoint``, which names the latest one, are written to a temporary
    file that then replaces them atomically. Non-finite weights are not saved.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = _AtomicPathManager()

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as ``<name>.pth`` and update ``last_checkpoint``.

        Raises:
            FloatingPointError: If a weight is not finite.
            OSError: If the file cannot be written, for instance because the disk is full.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        wrong = nonfinite_parameters(self.model)
        if wrong:
            raise FloatingPointError(
                f"{name}.pth was not written: weights such as {wrong[0]} are not finite, although "
                f"the losses were."
            )
        remove_stale_temp_files(self.save_dir)  # safe: only one process saves
        super().save(name, **kwargs)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load like detectron2; if the latest checkpoint is corrupt, load the newest intact one.

        Args:
            path: Path of the initial weights, used unless a checkpoint is resumed.
            resume: Whether to resume from the latest checkpoint in the output folder, if any.

        Raises:
            OSError: If there are checkpoints, but none is intact.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        # One process searches, because all must load the same file.
        found = comm.all_gather(self._latest_intact() if comm.is_main_process() else "")[0]
        if not found:
            raise OSError(
                f"--resume finds no intact checkpoint in {self.save_dir!r}: "
                f"{self.get_checkpoint_file()!r} is corrupt or missing, and so are all others. "
                f"Restore one, or restart without --resume."
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
                    f"The latest checkpoint, {named}, is corrupt or missing: resuming from {file}, "
                    f"the newest intact one."
                )
                return file
        return ""


class _AtomicPathManager:
    """detectron2's PathManager, except that local files are written atomically."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **options: Any) -> IO[Any]:
        if "w" in mode and os.path.isdir(os.path.dirname(path) or "."):
            return atomic_write(path, mode)
        return PathManager.open(path, mode, **options)


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that contain an infinity or a NaN."""
    return [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]


def is_intact(path: str) -> bool:
    """Whether a checkpoint is complete and undamaged, by its checksums, which torch ignores."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # a corrupt header can raise anything
        return False
