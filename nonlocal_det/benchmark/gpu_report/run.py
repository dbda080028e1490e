"""Runs the parts of the report within a time budget; each result is kept as soon as it is there.

Tasks run in processes of their own, a new one after each error: a GPU's error can leave a process
unusable, or kill it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import multiprocessing.process
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...engine.run_info import versions
from ...errors import summarize_error
from ...utils.file_io import atomic_write
from ..report import machine_info
from .page import make_page
from .parts import PARTS, Part, Row, Task

FILES = ("gpu_report.json", "gpu_report.md")
Report = dict[str, Any]
# Runs a part on a device until two values of time.monotonic(): starts no task after the first, and
# ends a running one at the second.
Runner = Callable[[Part, str, float, float], Iterator[Row]]

_PATH = re.compile(r"(?<![\w./])(?:/[\w.+-]+)+/")  # the folders of an absolute path
_SPARE = 0.05  # of the budget, for the last task of a part
_TERMINATE_SECONDS = 5.0


def make_report(
    device: str,
    budget: float,
    *,
    keep: Callable[[Report], None],
    run: Runner,
    parts: Sequence[Part] = PARTS,
    show: Callable[[str], None] = print,
) -> Report:
    """Run the parts, one after the other.

    Args:
        device: "cuda", or "cpu" for the small sizes.
        budget: Time for all, seconds.
        keep: Receives the report after each part, also after one that is interrupted.
        run: `run_in_processes` or `run_here`.
        parts: The parts, whose shares add up to at most 0.95.
        show: Receives the lines of progress.

    Returns:
        ``machine``, ``device``, ``budget``, ``failures``: names of what is wrong, and ``parts``: of
        each its ``title``, ``rows``, whether it ``checks``, and ``seconds``. A row has its ``name``
        and what its task returned, or ``error`` or ``skipped``, one line each.
    """
    start, share = time.monotonic(), 0.0
    report: Report = {"machine": machine(device), "device": device, "budget": budget}
    report.update(failures=[], parts={})
    for part in parts:
        share += part.share
        deadline = start + budget * share
        entry = {"title": part.title, "checks": part.checks, "rows": [], "seconds": 0.0}
        report["parts"][part.name] = entry
        began = time.monotonic()
        show(f"{began - start:4.0f} s  {part.title} ...")
        try:
            for row in run(part, device, deadline, deadline + budget * _SPARE):
                entry["rows"].append(_finite(row))
        finally:
            entry["seconds"] = round(time.monotonic() - began, 1)
            report["failures"] += [f"{part.title}: {row['name']}" for row in _failed(entry)]
            keep(report)
    return report


def write_report(report: Report, folder: str) -> None:
    """Write the `FILES` into an existing folder."""
    for name, text in zip(FILES, (json.dumps(report, indent=1), make_page(report))):
        with atomic_write(os.path.join(folder, name)) as file:
            file.write(text)


def _failed(entry: dict[str, Any]) -> list[Row]:
    """The rows of a part that are wrong."""
    rows = entry["rows"]
    return [r for r in rows if not r.get("passed", True) or (entry["checks"] and "error" in r)]


def machine(device: str) -> dict[str, Any]:
    """Names and versions of what is measured."""
    found = {**machine_info(device, torch.get_num_threads()), **versions()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["memory, GiB"] = properties.total_memory / 2**30
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def run_here(part: Part, device: str, deadline: float, end: float) -> Iterator[Row]:
    """Run a part in this process, which cannot end a task."""
    for task in part.tasks(device, deadline):
        yield {"name": task.name, **_attempt(task, deadline)}


def run_in_processes(part: Part, device: str, deadline: float, end: float) -> Iterator[Row]:
    """Run a part in processes that are forked from a server that has imported the code."""
    tasks, done = part.tasks(device, deadline), 0
    while done < len(tasks):
        late = _too_late(tasks[done], deadline)
        if late:
            yield {"name": tasks[done].name, **late}
            done += 1
            continue
        with _started(part, device, done, deadline) as (process, receiver):
            row: Row = {}
            while done < len(tasks) and "error" not in row:
                row = {"name": tasks[done].name, **_receive(process, receiver, end)}
                yield row
                done += 1


@contextmanager
def _started(
    part: Part, device: str, first: int, deadline: float
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    """A process that runs the tasks of a part from the given one on; it does not outlive this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_perform.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_perform, args=(sender, part, device, first, deadline))
    process.start()
    sender.close()
    try:
        yield process, receiver
    finally:
        receiver.close()
        process.terminate()
        process.join(_TERMINATE_SECONDS)
        process.kill()
        process.join()


def _perform(sender: Connection, part: Part, device: str, first: int, deadline: float) -> None:
    """Send the results of a part's tasks, until one is an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what the task has started
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes, between our lines
    for task in part.tasks(device, deadline)[first:]:
        result = _attempt(task, deadline)
        sender.send(result)
        if "error" in result:
            return


def _receive(process: multiprocessing.process.BaseProcess, receiver: Connection, end: float) -> Row:
    """The next result of a process, or what became of it instead."""
    try:
        if receiver.poll(max(end - time.monotonic(), 0)):
            return receiver.recv()
        return {"error": "it did not end in time"}
    except EOFError:
        process.join()
        return {"error": f"its process ended with exit code {process.exitcode}"}


def _too_late(task: Task, deadline: float) -> Row:
    """``skipped``, if too little time is left for a task, or nothing."""
    left = deadline - time.monotonic()
    if left > task.seconds:
        return {}
    need = f"; it needs about {task.seconds:.0f} s" if task.seconds else ""
    return {"skipped": f"{max(left, 0):.0f} s were left{need}"}


def _attempt(task: Task, deadline: float) -> Row:
    """What a task returns, or an ``error``, or ``skipped`` if too little time is left."""
    try:
        return _too_late(task, deadline) or task.run()
    except Exception as error:
        return {"error": one_line(summarize_error(error))}


def one_line(text: str) -> str:
    """Text on one line, without the folders of absolute paths."""
    return _PATH.sub("", " ".join(text.split()))


def _finite(value: Any) -> Any:
    """The same plain data, with None for numbers that are not finite, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
