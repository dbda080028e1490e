"""Atomic writing of checkpoints, and resuming from the latest intact one."""

from __future__ import annotations

import os
from typing import IO, Any, Optional

import detectron2.utils.comm as comm
import torch.nn as nn
from detectron2.utils.file_io import PathManager

from ..utils.file_io import atomic_write, remove_stale_temp_files
from .detection_checkpoint import NonLocalCheckpointer
from .latest import TAG_FILE, has_checkpoints, latest_checkpoint, tagged_checkpoint


class AtomicCheckpointer(NonLocalCheckpointer):
    """`NonLocalCheckpointer` whose files stay intact if the program is killed at any moment.

    A checkpoint and ``last_checkpoint``, which names the latest one, are written to a temporary
    file that then replaces them atomically. Weights and statistics that are not finite are not
    saved.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = _AtomicPathManager()
        self._resumed_from = ""
        self._tag_at_start = self._tag_stamp()

    def save(self, name: str, **kwargs: Any) -> None:
        """Save as ``<name>.pth`` and update ``last_checkpoint``.

        Raises:
            FloatingPointError: If a weight or a running statistic is not finite.
            OSError: If the file cannot be written, for instance because the disk is full.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        wrong = nonfinite_tensors(self.model)
        if wrong:
            raise FloatingPointError(
                f"{name}.pth was not written: tensors such as {wrong[0]} are not finite, although "
                f"the losses were."
            )
        remove_stale_temp_files(self.save_dir)  # safe: only one process saves
        super().save(name, **kwargs)

    def has_checkpoint(self) -> bool:
        """Whether the output folder has a checkpoint, or ``last_checkpoint`` names one."""
        return has_checkpoints(self.save_dir)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load like detectron2; if the latest checkpoint is corrupt, load the newest intact one.

        Args:
            path: Path of the initial weights, used unless a checkpoint is resumed.
            resume: Whether to resume from the latest checkpoint in the output folder, if any.

        Raises:
            OSError: If there are checkpoints, but none is intact.
        """
        if not resume:
            return super().resume_or_load(path, resume=False)
        # One process searches, because all must load the same file.
        found = latest_checkpoint(self.save_dir) if comm.is_main_process() else ""
        found = comm.all_gather(found)[0]
        check_any_intact(self.save_dir, found)
        if not found:
            return super().resume_or_load(path, resume=False)
        if found != tagged_checkpoint(self.save_dir):
            self.logger.warning(
                f"{TAG_FILE} in {self.save_dir!r} does not name the newest intact checkpoint, or "
                f"what it names is corrupt or missing: resuming from {found}."
            )
        self._resumed_from = found
        return self.load(found)

    def kept_checkpoint(self) -> str:
        """Return the path of the checkpoint that this run saved last or else was resumed from."""
        if self._tag_stamp() == self._tag_at_start:
            return self._resumed_from
        return tagged_checkpoint(self.save_dir)

    def _tag_stamp(self) -> Optional[tuple[int, int]]:
        """A stamp of ``last_checkpoint``, which each checkpoint changes."""
        try:
            status = os.stat(os.path.join(self.save_dir, TAG_FILE))
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino


def check_any_intact(folder: str, found: str) -> None:
    """Check that a directory has an intact checkpoint, if it has any.

    Args:
        folder: Output directory.
        found: Its `latest_checkpoint`.

    Raises:
        OSError: If there are checkpoints, but none is intact.
    """
    if not found and has_checkpoints(folder):
        raise OSError(
            f"--resume finds no intact checkpoint in {folder!r}: "
            f"{tagged_checkpoint(folder) or TAG_FILE!r} is corrupt or missing, and so are all "
            f"others. Restore one, or restart without --resume."
        )


class _AtomicPathManager:
    """detectron2's PathManager, except that local files are written atomically."""

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    def open(self, path: str, mode: str = "r", **options: Any) -> IO[Any]:
        if "w" in mode and os.path.isdir(os.path.dirname(path) or "."):
            return atomic_write(path, mode)
        return PathManager.open(path, mode, **options)


def nonfinite_tensors(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that contain a NaN, or an infinity that must not be.

    A buffer other than a running statistic may hold infinities, for instance as a mask.
    """
    parameters = dict(model.named_parameters())
    return [
        name
        for name, tensor in (*parameters.items(), *model.named_buffers())
        if tensor.isnan().any()
        or tensor.isinf().any()
        and (name in parameters or ".running_" in f".{name}")
    ]
