"""A suite's trainings, by ``tools/train_net.py`` in processes of their own, and what each left.

A run is done when its folder has ``result.json``. One that was interrupted goes on from its last
checkpoint, so a suite may be stopped and started at any time.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..engine.run_info import read_run_info
from ..utils.file_io import atomic_write
from .distance_ap import ap_by_distance
from .suite import Run, Suite

RESULT = "result.json"
LOG = "output.txt"


def train_all(
    suite: Suite, output: str, program: Sequence[str], *, jobs: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Train and evaluate what is not yet done; yield each run's result when there is one.

    Args:
        suite: what to train.
        output: folder below which each run has its own.
        program: the command that trains, up to its arguments.
        jobs: how many to train at once.
        threads: of each.

    Raises:
        RuntimeError: if a run fails, with the end of what it printed; those that run are awaited.
    """
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(train, suite, run, output, program, threads) for run in suite.runs()]
        try:
            for done in as_completed(pending):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def train(
    suite: Suite, run: Run, output: str, program: Sequence[str], threads: int
) -> dict[str, Any]:
    """The result of one run, which is trained if it has none yet."""
    folder = os.path.join(output, run.folder)
    result = read_result(folder)
    if result is not None:
        return result
    os.makedirs(folder, exist_ok=True)
    command = [*program, "--config-file", suite.config, "--resume"]
    start = time.perf_counter()
    with open(os.path.join(folder, LOG), "ab") as log:
        done = subprocess.run(
            [*command, *run.options, "OUTPUT_DIR", folder],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(f"{run.folder} ended with {done.returncode}: see {log.name!r}.")
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
    """What run.json says of a start, without the places of this machine."""
    kept = {key: start[key] for key in ("started", "seed", "versions", "git")}
    arguments = [os.path.relpath(a) if os.path.isabs(a) else a for a in start["command"][1:]]
    machine = {key: value for key, value in start["machine"].items() if key != "name"}
    return {**kept, "command": shlex.join(["python", *arguments]), "machine": machine}


def last_metrics(folder: str) -> dict[str, float]:
    """AP, AP50 and AP75 of each task that a run ended with, by their names in metrics.json."""
    with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as file:
        last = json.loads(file.readlines()[-1])
    return {key: value for key, value in last.items() if key.endswith(("/AP", "/AP50", "/AP75"))}


def distances(suite: Suite, run: Run, output: str, reach: float) -> dict[str, Any]:
    """A finished run's AP by the suite's ranges of distances, and by the one beyond ``reach``."""
    folder = os.path.join(output, run.folder, "inference")
    with open(os.path.join(folder, "coco_instances_results.json"), encoding="utf-8") as file:
        found = json.load(file)
    json_file = PathManager.get_local_path(_validation(suite, run))
    (beyond,) = ap_by_distance(json_file, found, (reach, suite.distances[-1]))
    return {
        "by_distance": ap_by_distance(json_file, found, suite.distances),
        "beyond_reach": beyond,
    }


def _validation(suite: Suite, run: Run) -> str:
    cfg: CfgNode = load_config(suite.config, run.options)
    return MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file


def read_result(folder: str) -> Optional[dict[str, Any]]:
    """What a finished run left, or None."""
    try:
        with open(os.path.join(folder, RESULT), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
