"""Trains the models of the demo, each in a process of its own, and shows how far they are."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from ..engine.training_process import ended_at_exit, failure_message, last_line, start_training

ACCURACY = "fast_rcnn/fg_cls_accuracy"
_INTERVAL = 20  # iterations between two lines; detectron2 writes its metrics as often
_POLL = 0.5  # seconds


@dataclass(frozen=True)
class Model:
    """One of the models.

    Attributes:
        name: What sets it apart.
        folder: Output folder of its training.
        options: ``KEY VALUE`` pairs that override the demo's config.
    """

    name: str
    folder: str
    options: tuple[str, ...]

    @property
    def weights(self) -> str:
        """Path of the weights that its training leaves."""
        return os.path.join(self.folder, "model_final.pth")

    @property
    def detections(self) -> str:
        """Path of the detections, in COCO's format, that its evaluation leaves."""
        return os.path.join(self.folder, "inference", "coco_instances_results.json")


def two_models(output: str, options: Sequence[str]) -> tuple[Model, Model]:
    """The stock model and the one with a block, with the same further options."""
    without = (*options, "MODEL.NONLOCAL.POSITIONS", "()")
    return (
        Model("without a block", os.path.join(output, "without_block"), without),
        Model("with a block", os.path.join(output, "with_block"), tuple(options)),
    )


def train_models(
    models: Sequence[Model],
    config_file: str,
    *,
    at_once: bool,
    max_iter: int,
    show: Callable[[str], None] = print,
) -> None:
    """Train and evaluate models from scratch, or from where they were stopped.

    Args:
        models: The models.
        config_file: Their common config.
        at_once: Train all at the same time, one thread each, instead of one after the other.
        max_iter: Iterations of a training.
        show: Receives the lines of progress.

    Raises:
        RuntimeError: If a training fails; the message has the last line of its output.
    """
    show(f"  {'iteration':>12}" + "".join(f"{model.name:>18}" for model in models) + "   time left")
    for together in [models] if at_once else [[model] for model in models]:
        processes = [start_training(config_file, model.options, model.folder) for model in together]
        with ended_at_exit(processes):
            _watch(models, together, processes, max_iter, show)


def _watch(
    models: Sequence[Model],
    running: Sequence[Model],
    processes: Sequence[subprocess.Popen[bytes]],
    max_iter: int,
    show: Callable[[str], None],
) -> None:
    """Show the progress of running trainings until they end."""
    shown = None  # nothing yet: trainings may resume
    while True:
        codes = [process.poll() for process in processes]
        for model, code in zip(running, codes):
            if code:
                raise RuntimeError(
                    f"{failure_message(model.folder, code)} {last_line(model.folder)}"
                )
        records = {model: _last_record(model) for model in models}
        of_running = [records[model] for model in running]
        done = min(record.get("iteration", -1) + 1 for record in of_running)
        shown = done if shown is None else shown
        if done >= min(shown + _INTERVAL, max_iter) and done > shown:
            shown = done
            columns = "".join(f"{_percent(records[model].get(ACCURACY)):>18}" for model in models)
            left = _time_left(of_running, done == max_iter)
            show(f"  {f'{done} of {max_iter}':>12}{columns}{left:>12}")
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL)


def _time_left(records: Sequence[dict[str, Any]], ended: bool) -> str:
    """The time until the slower training ends, as detectron2 estimates it."""
    if ended:
        return "evaluating"
    seconds = [record["eta_seconds"] for record in records if "eta_seconds" in record]
    return f"{int(max(seconds)) // 60}:{int(max(seconds)) % 60:02d}" if seconds else ""


def _last_record(model: Model) -> dict[str, Any]:
    """The latest complete line of a training's metrics that has an iteration's; {} for none."""
    try:
        with open(os.path.join(model.folder, "metrics.json"), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if ACCURACY in record:
                return record
    return {}


def _percent(share: Optional[float]) -> str:
    return "" if share is None else f"{share:.0%}"
