"""Output folders of training and evaluation: never one with somebody else's files."""

from __future__ import annotations

import os
from collections.abc import Sequence

_EVALUATION_FILES = ("config.yaml", "log.txt", "inference")
_TRAINING_FILES = (*_EVALUATION_FILES, "metrics.json", "last_checkpoint", "model_final.pth")


def check_run_folder(
    folder: str, *, eval_only: bool = False, resume: bool = False, others: Sequence[str] = ()
) -> None:
    """Check that a run may write to a folder, which a run is known by its ``config.yaml``.

    Args:
        folder: Output folder; a URL is not checked.
        eval_only: Whether the run only evaluates.
        resume: Whether the run resumes the one in the folder.
        others: Names of further files and folders that the run writes.

    Raises:
        FileExistsError: If the folder has files of the names of a run's, but is not that of a run.
    """
    if "://" in folder or _has_written_config(folder):
        return
    names = ("config.yaml",) if resume else _EVALUATION_FILES if eval_only else _TRAINING_FILES
    for name in (*names, *others):
        path = os.path.join(folder, name)
        if os.path.lexists(path):
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
