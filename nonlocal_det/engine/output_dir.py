"""The output directory of a run: an earlier run's checkpoints, and a lock against other runs."""

from __future__ import annotations

import errno
import fcntl
import os

import detectron2.utils.comm as comm

from ..checkpoint.atomic_checkpoint import check_any_intact
from ..checkpoint.latest import is_intact, latest_checkpoint, saved_checkpoints
from .run_info import read_run_info

LOCK_FILE = ".lock"


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
    if not eval_only:
        read_run_info(path)
    if resume:
        found = latest_checkpoint(path)
        check_any_intact(path, found)
        return found
    others = [] if eval_only else sorted(filter(is_intact, saved_checkpoints(path)))
    if others:
        raise FileExistsError(
            f"{key} {path!r} has the checkpoints of another run ({os.path.basename(others[-1])}), "
            f"which this one would overwrite: pass --resume to continue that run, choose another "
            f"{key}, or remove them."
        )
    return ""


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
