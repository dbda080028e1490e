"""The trainings of a suite, each a ``nonlocal-det train`` process, and their results.

A run is finished when its folder has ``result.json``. One that was interrupted resumes from its
last checkpoint, so a suite may be stopped and started at any time. Both only if the ``config.yaml``
that training left there is today's configuration of the run.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import differing_settings, load_config
from ..engine import check_dataset_registered
from ..engine.run_info import read_run_info
from ..modeling.supported_positions import check_positions
from ..utils.file_io import atomic_write
from .distance_ap import ap_by_distance
from .suite import Run, Suite

RESULT = "result.json"
LOG = "output.txt"
PROMPT = b"$ "  # begins the log of a run
TRAIN_COMMAND = (sys.executable, "-m", "nonlocal_det", "train")


def check_suite(suite: Suite, output: str) -> str:
    """Check, before anything is trained, that each run can start, or resume.

    Args:
        suite: Suite to train.
        output: Folder below which each run has its own.

    Returns:
        The device that the suite trains on.

    Raises:
        ValueError: If a key, value or position does not exist, or if the folder of a run has one of
            another configuration.
        FileExistsError: If the folder of a run has other files.
        FileNotFoundError: If a dataset is missing.
    """
    for run in suite.runs():
        cfg = load_config(suite.config, run.options)
        check_positions(cfg)
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            check_dataset_registered(name)
        check_same_run(os.path.join(output, run.folder), cfg)
    return cfg.MODEL.DEVICE


def check_same_run(folder: str, cfg: CfgNode) -> None:
    """Check that what a run's folder holds, if anything, is of this run.

    Args:
        folder: Folder of the run.
        cfg: Configuration of the run.

    Raises:
        ValueError: If it is a run of another configuration; the message says what differs.
        FileExistsError: If it has other files.
    """
    config = os.path.join(folder, "config.yaml")
    if not os.path.exists(folder) or _is_just_begun(folder):
        return
    if not os.path.isfile(config):
        raise FileExistsError(
            f"{folder!r} has files that are of no run; move them, or choose another --output."
        )
    differing = [
        f"{key} was {before!r}, is {value!r}"
        for key, (before, value) in differing_settings(config, cfg).items()
        if key not in ("OUTPUT_DIR", "MODEL.DEVICE")
    ]
    if differing:
        raise ValueError(
            f"{folder!r} has a run of another configuration: {'; '.join(differing[:3])}"
            f"{'; ...' if len(differing) > 3 else ''}. Move it, or choose another --output."
        )


def _is_just_begun(folder: str) -> bool:
    """Whether a folder is empty, or a run ended before it had written its configuration."""
    names = os.listdir(folder)
    if names == [LOG]:
        with open(os.path.join(folder, LOG), "rb") as log:
            return log.read(len(PROMPT)) == PROMPT
    return not names


def train_all(suite: Suite, output: str, *, jobs: int, threads: int) -> Iterator[dict[str, Any]]:
    """Train and evaluate the unfinished runs; yield the result of each run once it has one.

    Args:
        suite: Suite to train.
        output: Folder below which each run has its own.
        jobs: Number of parallel trainings.
        threads: Number of CPU threads of each training.

    Raises:
        RuntimeError: If a run fails, with the file of its output; running ones are waited for.
    """
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(train, suite, run, output, threads) for run in suite.runs()]
        try:
            for done in as_completed(pending):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def train(suite: Suite, run: Run, output: str, threads: int) -> dict[str, Any]:
    """Return the result of one run, which is trained if it has none yet.

    Raises:
        ValueError: If the folder has a run of another configuration.
        OSError: If the folder has other files, or cannot be written to.
        RuntimeError: If the training fails.
    """
    folder = os.path.join(output, run.folder)
    check_same_run(folder, load_config(suite.config, run.options))
    result = read_result(folder)
    if result is not None:
        return result
    os.makedirs(folder, exist_ok=True)
    start = time.perf_counter()
    command = [*TRAIN_COMMAND, "--config-file", suite.config, "--resume", *run.options]
    command += ["OUTPUT_DIR", folder]
    with open(os.path.join(folder, LOG), "ab") as log:
        log.write(PROMPT + shlex.join(command).encode() + b"\n")
        log.flush()
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(f"{run.folder} failed with exit code {done.returncode}: see {log.name}.")
    result = {
        "task": run.task,
        "variant": run.variant,
        "seed": run.seed,
        "seconds": round(time.perf_counter() - start, 1),
        "metrics": last_metrics(folder),
        "run": anonymized(read_run_info(folder)[-1]),
    }
    with atomic_write(os.path.join(folder, RESULT)) as file:
        json.dump(result, file)
    return result


def anonymized(start: dict[str, Any]) -> dict[str, Any]:
    """The entry of a start in run.json, without this machine's name and paths."""
    kept = {key: start[key] for key in ("started", "seed", "versions", "git")}
    program, *arguments = start["command"][1:]
    script = ["-m", "nonlocal_det"] if program.endswith("__main__.py") else [program]
    command = [os.path.relpath(a) if os.path.isabs(a) else a for a in (*script, *arguments)]
    machine = {key: value for key, value in start["machine"].items() if key != "name"}
    return {**kept, "command": shlex.join(["python", *command]), "machine": machine}


def last_metrics(folder: str) -> dict[str, float]:
    """AP, AP50 and AP75 of each task at the end of a run, by their names in metrics.json."""
    with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    return {key: value for key, value in last.items() if key.endswith(("/AP", "/AP50", "/AP75"))}


def evaluate_by_distance(suite: Suite, run: Run, output: str, reach: float) -> dict[str, Any]:
    """Evaluate a finished run at the suite's ranges of distances and beyond ``reach`` pixels."""
    folder = os.path.join(output, run.folder, "inference")
    with open(os.path.join(folder, "coco_instances_results.json"), encoding="utf-8") as file:
        detections = json.load(file)
    dataset = load_config(suite.config, run.options).DATASETS.TEST[0]
    json_file = PathManager.get_local_path(MetadataCatalog.get(dataset).json_file)
    (beyond,) = ap_by_distance(json_file, detections, (reach, suite.distances[-1]))
    return {
        "by_distance": ap_by_distance(json_file, detections, suite.distances),
        "beyond_reach": beyond,
    }


def read_result(folder: str) -> Optional[dict[str, Any]]:
    """The result of a finished run, or None."""
    try:
        with open(os.path.join(folder, RESULT), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
