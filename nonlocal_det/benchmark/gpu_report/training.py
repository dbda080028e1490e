"""A short training with a block and one without, on a task whose cue is far from the objects."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog

from ...config import load_config
from ...engine.training_process import ended_at_exit, last_line, num_cores, start_training

# The task "far" of the suite ablation/lamps, and two of its variants.
CONFIG = "Base-Lamps-Faster-RCNN-C4"
VARIANTS = {
    "no block": (),
    "embedded Gaussian": ("MODEL.NONLOCAL.POSITIONS", "('res4[-2]',)"),
}
_POLL = 0.5  # seconds


def train_far_task(device: str, deadline: float, options: Sequence[str] = ()) -> dict[str, Any]:
    """Train both variants with one seed; where there are several CPU cores, at the same time.

    Args:
        device: "cpu" or "cuda".
        deadline: Value of ``time.monotonic()`` at which they must have ended.
        options: ``KEY VALUE`` pairs that override the config.

    Returns:
        ``dataset``, ``iterations``, and ``variants``: by name ``AP`` and ``AP50`` of boxes, and
        ``seconds``.

    Raises:
        TimeoutError: If they have not ended by then.
        RuntimeError: If one fails; the message has the last line of its output.
    """
    options = ("MODEL.DEVICE", device, *options)
    cfg = load_config(CONFIG, options)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)  # generates it, once for both
    variants: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as output:
        for names in [list(VARIANTS)] if num_cores() > 1 else [[name] for name in VARIANTS]:
            variants.update(_train(output, names, options, deadline))
    iterations = cfg.SOLVER.MAX_ITER
    return {"dataset": cfg.DATASETS.TEST[0], "iterations": iterations, "variants": variants}


def _train(
    output: str, names: Sequence[str], options: Sequence[str], deadline: float
) -> dict[str, Any]:
    folders = {name: os.path.join(output, name) for name in names}
    processes = {
        name: start_training(CONFIG, (*options, *VARIANTS[name]), folders[name]) for name in names
    }
    with ended_at_exit(list(processes.values())):
        seconds = _wait(processes, folders, deadline)
    return {
        name: {**_average_precision(folders[name]), "seconds": round(seconds[name], 1)}
        for name in names
    }


def _wait(
    processes: Mapping[str, subprocess.Popen[bytes]], folders: Mapping[str, str], deadline: float
) -> dict[str, float]:
    """Wait for all; the seconds that each took."""
    start = time.monotonic()
    seconds: dict[str, float] = {}
    while len(seconds) < len(processes):
        if time.monotonic() > deadline:
            raise TimeoutError("the trainings did not end in time")
        for name in processes.keys() - seconds.keys():
            code = processes[name].poll()
            if code:
                said = last_line(folders[name])
                raise RuntimeError(f"{name} ended with exit code {code}: {said}")
            if code == 0:
                seconds[name] = time.monotonic() - start
        time.sleep(_POLL)
    return seconds


def _average_precision(folder: str) -> dict[str, float]:
    """Box AP and AP50 at the end of a training."""
    with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as file:
        last = json.loads(file.read().splitlines()[-1])
    return {name: last[f"bbox/{name}"] for name in ("AP", "AP50")}
