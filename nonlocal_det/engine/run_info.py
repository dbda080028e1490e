"""``run.json`` in the output directory: with ``config.yaml``, all that repeats a run."""

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
    """Read the launches of training in an output directory, oldest first.

    Args:
        folder: Output directory.

    Raises:
        ValueError: If its ``run.json`` is not a JSON list.
    """
    path = os.path.join(folder, RUN_INFO_FILE)
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            launches = json.load(file)
        if isinstance(launches, list):
            return launches
    except ValueError:
        pass
    raise ValueError(f"{path} is not a valid run.json (expected a JSON list); fix or move it.")


def choose_seed(seed: int, folder: str, args: Namespace) -> int:
    """Choose the seed of a run, the same on all ranks.

    Args:
        seed: Seed of the config; negative for none.
        folder: Output directory.
        args: detectron2's standard flags.

    Returns:
        The given seed. For training without one: the seed of the run that is resumed, or a new one.
    """
    if args.eval_only:
        return seed
    if seed < 0:
        launches = read_run_info(folder) if args.resume else []
        seed = launches[-1]["seed"] if launches else secrets.randbelow(2**31)
    return comm.all_gather(seed)[0]


def append_run_info(folder: str, *, seed: int, resume: bool) -> None:
    """Append this launch of training to ``run.json``, on the main process.

    Args:
        folder: Output directory, which exists.
        seed: Seed of the run.
        resume: Whether the launch resumes the run.
    """
    if not comm.is_main_process():
        return
    info = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "working_folder": os.getcwd(),
        "resume": resume,
        "seed": seed,
        "processes": comm.get_world_size(),
        "machine": _machine(),
        "versions": versions(),
        "git": {
            "working_folder": commit_of(os.getcwd()),
            "nonlocal_det": commit_of(os.path.dirname(nonlocal_det.__file__)),
        },
    }
    launches = [*read_run_info(folder), info]
    with atomic_write(os.path.join(folder, RUN_INFO_FILE)) as file:
        json.dump(launches, file, indent=1)
        file.write("\n")


def _machine() -> dict[str, Any]:
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, Optional[str]]:
    """Versions of Python, this package, and what it runs on."""
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
    """Return the git commit of a directory, and whether files differ from it.

    Returns:
        A dict with "commit" and "dirty"; None outside of a git repository.
    """
    describe = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*describe, "--exclude=*"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    if done.returncode:
        return None
    commit, _, dirty = done.stdout.strip().partition("-")
    return {"commit": commit, "dirty": bool(dirty)}
