"""Going on where a run was stopped, as if it had not been."""

from __future__ import annotations

import json
import os
from typing import Any, Optional

import detectron2.utils.comm as comm
from detectron2.engine import HookBase

from .stream import TrainingStream, seed_step

_WINDOW = 20  # values of a scalar that detectron2's writers look back on
# How fast a run is starts anew: detectron2 measures it from the third step on, and until then an
# old value would get a line of its own in the metrics.
_TIMES = ("time", "eta_seconds")


class ResumeHook(HookBase):
    """Makes a run that is resumed give, to the bit, what one that was never stopped gives.

    Weights, optimiser and schedule are in detectron2's checkpoints. This adds the pictures, the
    random draws of every step, and ``metrics.json``: each iteration is in it once. What was due
    after a checkpoint, evaluation for one, and was cut short, is done when training goes on.

    Args:
        stream: what training iterates over; another kind of loader begins anew.
        seed: of the steps' draws; the same in all processes.
        folder: of ``metrics.json``.
        later: the hooks that act after the one that saves checkpoints. This one comes after them.

    Attributes:
        resumes: whether this run goes on with what the folder holds; otherwise that is left alone.
    """

    def __init__(self, stream: Any, seed: int, folder: str, later: list[HookBase]) -> None:
        self._stream = stream
        self._seed = seed
        self._metrics = os.path.join(folder, "metrics.json")
        self._later = later
        self._scalars: dict[str, Any] = {}
        self.resumes = False

    def state_dict(self) -> dict[str, Any]:
        """The last values of all scalars, for the medians in the next line of the metrics."""
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        return {
            "scalars": {
                name: {"values": history.values()[-_WINDOW:], "smoothing": hints[name]}
                for name, history in storage.histories().items()
                if name not in _TIMES
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep them until training starts."""
        self._scalars = state["scalars"]

    def before_train(self) -> None:
        """Go to the place in the data; mend the metrics."""
        start = self.trainer.start_iter
        if isinstance(self._stream, TrainingStream):
            self._stream.start = start
        if not self.resumes:
            return
        last = cut_metrics(self._metrics, start) if comm.is_main_process() else None
        last = comm.all_gather(last)[0]
        if start:
            self._recall(start - 1, -1 if last is None else last)
            self._finish(start - 1, last)

    def _recall(self, iteration: int, written: int) -> None:
        """Put back scalars of the last iteration, and older ones that were not written yet."""
        storage = self.trainer.storage
        for name, scalar in self._scalars.items():
            newest = scalar["values"][-1][1]
            if newest == iteration or newest > written:
                for value, put_at in scalar["values"]:
                    storage.iter = put_at
                    storage.put_scalar(name, value, smoothing_hint=scalar["smoothing"])

    def _finish(self, iteration: int, written: Optional[int]) -> None:
        """Do what was due after the checkpoint of an iteration, unless it was done."""
        # Where no iteration is left, the trainer counts on from here.
        self.trainer.iter = self.trainer.storage.iter = iteration
        if written != iteration:
            for hook in self._later:
                hook.after_step()

    def before_step(self) -> None:
        """Let the step draw what belongs to its iteration."""
        seed_step(self._seed, self.trainer.iter)


def cut_metrics(path: str, start: int) -> Optional[int]:
    """Cut from ``metrics.json`` what comes after the last line of an iteration before ``start``.

    In place: detectron2 has opened it already, to append.

    Returns:
        The iteration of that line; None if there is none.
    """
    if not os.path.isfile(path):
        return None
    last, end, position = None, 0, 0
    with open(path, "rb+") as file:
        for line in file:
            position += len(line)
            iteration = _iteration(line)
            if iteration is not None and iteration < start:
                last, end = iteration, position
        file.truncate(end)
    return last


def _iteration(line: bytes) -> Optional[int]:
    """That of a whole line; None of one whose writing was cut short."""
    try:
        return json.loads(line)["iteration"] if line.endswith(b"\n") else None
    except ValueError:
        return None
