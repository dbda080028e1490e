"""The trainings of a suite, each a ``nonlocal-det train`` process, and their results.

A run is finished when its folder has ``result.json``. One that was interrupted resumes from its
last checkpoint, so a suite may be stopped and started at any time. Both only if the ``config.yaml``
that training left there is today's configuration of the run.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Optional

from detectron2.config import CfgNode

from ..config import differing_settings, load_config, settings_digest
from ..engine import check_dataset_registered
from ..engine.run_info import read_run_info
from ..engine.training_process import failure_message, is_just_begun, start_training
from ..modeling.supported_positions import check_positions
from ..utils.file_io import atomic_write
from .evaluate import evaluate_run
from .results import Result
from .suite import Run, Suite

RESULT = "result.json"
# Keys of a result.
KEYS = ("task", "variant", "seed", "settings", "metrics", "learned_at", "run")


def check_runs(suite: Suite, runs: Sequence[Run], output: str) -> None:
    """Check, before anything is trained, that each run can start, or resume.

    Args:
        suite: Suite of the runs.
        runs: Runs to train.
        output: Folder below which each run has its own.

    Raises:
        ValueError: If a key, value or position does not exist, or if the folder of a run has one of
            another configuration.
        FileExistsError: If the folder of a run has other files.
        FileNotFoundError: If a dataset is missing.
    """
    for run in (*_pretrainings(suite, runs), *runs):
        cfg = load_config(suite.config, _training_options(suite, run, output))
        check_positions(cfg)
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            check_dataset_registered(name)
        check_same_run(os.path.join(output, run.folder), cfg)


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
    if not os.path.exists(folder) or is_just_begun(folder):
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


def missing_runs(suite: Suite, results: Iterable[Result], reach: float) -> list[Run]:
    """The runs of a suite that have no result yet.

    Args:
        suite: The suite.
        results: Results of finished runs, of this suite or of others.
        reach: Distance from which on a cue is outside the baseline's receptive field.

    Raises:
        ValueError: If a run has a result of another configuration, or at other distances.
    """
    found = {(r["task"], r["variant"], r["seed"]): r for r in results}
    distances = [*suite.distances[:-1], reach] if suite.distances else []
    missing = []
    for run in suite.runs():
        result = found.get((run.task, run.variant, run.seed))
        if result is None:
            missing.append(run)
            continue
        ranges = [*result.get("by_distance", ()), result.get("beyond_reach")] if distances else []
        same = [r and r["low"] for r in ranges] == distances
        if not same or result["settings"] != _digest(suite, run):
            raise ValueError(
                f"The results have a run of {run.task!r}, {run.variant!r}, seed {run.seed}, of "
                f"another {'configuration' if same else 'suite, with other distances'}. Take it "
                f"out, or choose another --results."
            )
    return missing


def results_of(suite: Suite, results: Iterable[Result]) -> list[Result]:
    """The results of a suite's runs among others, in the order of the runs."""
    found = {(r["task"], r["variant"], r["seed"]): r for r in results}
    order = [(run.task, run.variant, run.seed) for run in suite.runs()]
    return [found[run] for run in order if run in found]


def _digest(suite: Suite, run: Run) -> str:
    """Digest of a run's settings and of those of its pretraining."""
    digest, before = (
        settings_digest(load_config(suite.config, run.options)),
        suite.pretraining_of(run),
    )
    return digest if before is None else f"{digest} from {_digest(suite, before)}"


def _pretrainings(suite: Suite, runs: Iterable[Run]) -> list[Run]:
    """The pretrainings that runs start from, each once."""
    before = map(suite.pretraining_of, runs)
    return list({run.folder: run for run in before if run is not None}.values())


def _training_options(suite: Suite, run: Run, output: str) -> list[str]:
    """The options of a run, with the path of the weights that it starts from."""
    before = suite.pretraining_of(run)
    if before is None:
        return [*run.options]
    return [*run.options, "MODEL.WEIGHTS", os.path.join(output, before.folder, "model_final.pth")]


def train_all(
    suite: Suite, runs: Sequence[Run], output: str, *, jobs: int, threads: int, reach: float
) -> Iterator[Result]:
    """Train and evaluate runs, the pretrainings first; yield the result of each once it has one.

    Args:
        suite: Suite of the runs.
        runs: Runs to train, unless their folders have results.
        output: Folder below which each run has its own.
        jobs: Number of parallel trainings.
        threads: Number of CPU threads of each training.
        reach: Distance from which on a cue is outside the baseline's receptive field.

    Raises:
        RuntimeError: If a run fails, with the file of its output; running ones are waited for.
    """
    for pretraining in _pretrainings(suite, runs):
        train(suite, pretraining, output, threads, reach)
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(train, suite, run, output, threads, reach) for run in runs]
        try:
            for done in as_completed(pending):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def train(suite: Suite, run: Run, output: str, threads: int, reach: float) -> Result:
    """Return the result of one run, which is trained if it has none yet.

    Raises:
        ValueError: If the folder has a run of another configuration.
        OSError: If the folder has other files, or cannot be written to.
        RuntimeError: If the training fails.
    """
    folder = os.path.join(output, run.folder)
    options = _training_options(suite, run, output)
    cfg = load_config(suite.config, options)
    check_same_run(folder, cfg)
    result = read_result(folder)
    if result is not None:
        return result
    start = time.perf_counter()
    exit_code = start_training(suite.config, options, folder, threads=threads).wait()
    if exit_code:
        raise RuntimeError(failure_message(folder, exit_code))
    result = {
        "task": run.task,
        "variant": run.variant,
        "seed": run.seed,
        "settings": _digest(suite, run),
        "seconds": round(time.perf_counter() - start, 1),
        **evaluate_run(folder, cfg.DATASETS.TEST, suite.distances, reach),
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


def read_result(folder: str) -> Optional[Result]:
    """The result of a finished run, or None; a result of an earlier version does not count."""
    try:
        with open(os.path.join(folder, RESULT), encoding="utf-8") as file:
            result = json.load(file)
    except FileNotFoundError:
        return None
    return result if set(KEYS) <= result.keys() else None
