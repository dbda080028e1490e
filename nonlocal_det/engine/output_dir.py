"""The output directory of a run: an earlier run's checkpoints, and a lock against other runs."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence

import detectron2.utils.comm as comm

from ..checkpoint.atomic_checkpoint import check_any_intact
from ..checkpoint.latest import is_intact, latest_checkpoint, saved_checkpoints
from .run_info import read_run_info

LOCK_FILE = ".lock"
_EVALUATION_FILES = ("config.yaml", "log.txt", "inference")
_TRAINING_FILES = (*_EVALUATION_FILES, "metrics.json", "last_checkpoint", "model_final.pth")


def check_output_dir(path: str, key: str, *, eval_only: bool, resume: bool) -> str:
    """Check that a run loses nothing that is in its output directory; nothing is written.

    Args:
        path: Output directory, which need not exist.
        key: Config key of the directory, for the error message.
        eval_only: Whether the run only evaluates.
        resume: Whether the run resumes from the latest checkpoint, if there is one.

    Returns:
        Path of the checkpoint to resume from; "" for none.

    Raises:
        OSError: If checkpoints of another run would be overwritten, or none is intact to resume.
        ValueError: If ``run.json`` is not valid.
    """
    if comm.is_main_process():  # the others may come when this one has begun to write
        check_run_folder(path, eval_only=eval_only, resume=resume)
    if not eval_only:
        read_run_info(path)
    if resume:
        found = latest_checkpoint(path)
        check_any_intact(path, found)
        return found
    saved = [] if eval_only else sorted(saved_checkpoints(path), reverse=True)
    other = next(filter(is_intact, saved), "")
    if other:
        raise FileExistsError(
            f"{key} {path!r} has the checkpoints of another run ({os.path.basename(other)}), "
            f"which this one would overwrite: pass --resume to continue that run, choose another "
            f"{key}, or remove them."
        )
    return ""


def check_run_folder(
    folder: str, *, eval_only: bool = False, resume: bool = False, others: Sequence[str] = ()
) -> None:
    """Check that a run may write to a folder.

    A run's folder is known by its `LOCK_FILE` or its ``config.yaml``.

    Args:
        folder: Output folder; a URL is not checked.
        eval_only: Whether the run only evaluates.
        resume: Whether the run resumes the one in the folder.
        others: Names of further files and folders that the run writes.

    Raises:
        FileExistsError: If the folder has files of the names of a run's, but is not that of a run.
    """
    is_locked = os.path.exists(os.path.join(folder, LOCK_FILE))
    if "://" in folder or is_locked or _has_written_config(folder):
        return
    names = ("config.yaml",) if resume else _EVALUATION_FILES if eval_only else _TRAINING_FILES
    for name in (*names, *others):
        path = os.path.join(folder, name)
        # An empty file is what a run leaves that was killed as it began to write.
        if os.path.lexists(path) and not (os.path.isfile(path) and os.path.getsize(path) == 0):
            raise FileExistsError(
                f"{path!r} would be overwritten, and {folder!r} is not the output folder of an "
                f"earlier run; choose another one."
            )


def _has_written_config(folder: str) -> bool:
    """Whether a folder has a complete config, as runs write it, YAML or lazy."""
    try:
        with open(os.path.join(folder, "config.yaml"), encoding="utf-8") as file:
            keys = {line.partition(":")[0] for line in file if ":" in line}
    except (OSError, UnicodeDecodeError):
        return False
    complete = {"VERSION", "OUTPUT_DIR", "SOLVER", "INPUT"}, {"train", "dataloader", "model"}
    return "_BASE_" not in keys and any(needed <= keys for needed in complete)


def lock_output_dir(path: str, key: str) -> None:
    """Let no other run train in a directory until this process ends, in whatever way.

    Args:
        path: Output directory, which exists.
        key: Config key of the directory, for the error message.

    Raises:
        BlockingIOError: If another run trains there.
    """
    if not comm.is_main_process():
        return
    # It stays open: to close it, or any other descriptor of this file, would end the lock. A lock
    # of this kind is not shared with DataLoader workers, which may outlive a killed run.
    descriptor = os.open(os.path.join(path, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system without locks
            raise BlockingIOError(
                f"Another run is training in {key} {path!r}: choose another {key}, or wait for it "
                f"to end."
            ) from error
