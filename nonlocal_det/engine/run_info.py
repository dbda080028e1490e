"""``run.json`` in the output folder: what is needed, beside ``config.yaml``, to repeat a run."""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
from argparse import Namespace
from datetime import datetime
from typing import Any, Optional

import detectron2
import detectron2.utils.comm as comm
import numpy as np
import torch
import torchvision

import nonlocal_det

from ..utils.file_io import atomic_write

RUN_INFO_FILE = "run.json"


def read_run_info(folder: str) -> list[dict[str, Any]]:
    """Read the starts of training in a folder, oldest first.

    Raises:
        ValueError: if the file holds something else.
    """
    path = os.path.join(folder, RUN_INFO_FILE)
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            starts = json.load(file)
        if isinstance(starts, list):
            return starts
    except ValueError:
        pass
    raise ValueError(f"{path} is no record of a run, a list in JSON: mend it, or move it away.")


def choose_seed(seed: int, folder: str, args: Namespace) -> int:
    """The seed given; for training, if it is negative, that of the run that goes on, or a new one.

    All processes get the same.
    """
    if args.eval_only:
        return seed
    if seed < 0:
        starts = read_run_info(folder) if args.resume else []
        seed = starts[-1]["seed"] if starts else secrets.randbelow(2**31)
    return comm.all_gather(seed)[0]


def append_run_info(folder: str, *, seed: int, resume: bool) -> None:
    """Add this start of training to those of the folder, which exists. The main process does."""
    if not comm.is_main_process():
        return
    start = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "working_folder": os.getcwd(),
        "resume": resume,
        "seed": seed,
        "processes": comm.get_world_size(),
        "machine": _machine(),
        "versions": _versions(),
        "git": {
            "working_folder": commit_of(os.getcwd()),
            "nonlocal_det": commit_of(os.path.dirname(nonlocal_det.__file__)),
        },
    }
    starts = [*read_run_info(folder), start]
    with atomic_write(os.path.join(folder, RUN_INFO_FILE)) as file:
        json.dump(starts, file, indent=1)
        file.write("\n")


def _machine() -> dict[str, Any]:
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _versions() -> dict[str, Optional[str]]:
    return {
        "python": platform.python_version(),
        "nonlocal_det": nonlocal_det.__version__,
        "detectron2": detectron2.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
    }


def commit_of(folder: str) -> Optional[dict[str, Any]]:
    """The commit that a folder is at, and whether files differ from it; None outside of git."""
    describe = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*describe, "--exclude=*"], capture_output=True, text=True)
    except OSError:  # no git
        return None
    if done.returncode:
        return None
    commit, _, dirty = done.stdout.strip().partition("-")
    return {"commit": commit, "dirty": bool(dirty)}
