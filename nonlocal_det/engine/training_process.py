"""Trainings in processes of their own, whose output goes to a file in their folder."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LOG = "output.txt"
PROMPT = b"$ "  # begins the log
TRAIN_COMMAND = (sys.executable, "-m", "nonlocal_det", "train")


def start_training(
    config_file: str, options: Sequence[str], folder: str, *, threads: int = 1
) -> subprocess.Popen[bytes]:
    """Start a training, or resume the one that the folder has.

    Args:
        config_file: Config file.
        options: ``KEY VALUE`` pairs that override it.
        folder: Output folder, which is created.
        threads: Number of CPU threads.

    Returns:
        The process, whose exit code is that of ``nonlocal-det train``.
    """
    os.makedirs(folder, exist_ok=True)
    command = [*TRAIN_COMMAND, "--config-file", config_file, "--resume", *options]
    command += ["OUTPUT_DIR", folder]
    with open(os.path.join(folder, LOG), "ab") as log:
        log.write(PROMPT + shlex.join(command).encode() + b"\n")
        log.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


@contextmanager
def ended_at_exit(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """In the end, also after an error, leave none of the trainings running."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
            process.wait()


def num_cores() -> int:
    """Number of CPU cores that this process may use, which is that of trainings at a time."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def is_just_begun(folder: str) -> bool:
    """Whether a folder is empty, or a training ended before it had written its configuration."""
    names = os.listdir(folder)
    if names == [LOG]:
        with open(os.path.join(folder, LOG), "rb") as log:
            return log.read(len(PROMPT)) == PROMPT
    return not names


def failure_message(folder: str, exit_code: int) -> str:
    """One sentence on a training that failed, with the file of its output."""
    return f"{folder} failed with exit code {exit_code}: see {os.path.join(folder, LOG)}."


def last_line(folder: str) -> str:
    """The last line of a training's output, which says why it failed."""
    with open(os.path.join(folder, LOG), encoding="utf-8", errors="replace") as file:
        return file.read().rstrip().rpartition("\n")[2]
