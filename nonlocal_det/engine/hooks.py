"""When a run cannot start or go on: one sentence that says where, why and what to change."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import detectron2.utils.comm as comm
import torch
import torch.nn as nn
from detectron2.engine import HookBase, TrainerBase
from torch import Tensor

from ..checkpoint.atomic_checkpoint import AtomicCheckpointer, nonfinite_parameters
from ..data.train_loader import ResumableTrainLoader, seed_iteration
from ..errors import TrainingError, is_out_of_memory

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WINDOW = 20  # values of a scalar that detectron2's writers look back on
# How fast a run is starts anew: detectron2 measures it from the third step on, and until then an
# old value would get a line of its own in the metrics.
_TIMES = ("time", "eta_seconds")


class TrainingErrorHook(HookBase):
    """Ends training, before a weight changes, when a loss is not finite; explains what ends it.

    It looks at what goes into the model and what comes out, so it works with any trainer, however
    that takes its steps.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._pictures = ""

    def before_train(self) -> None:
        """Attach to the model."""
        model = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after),
        ]

    def after_train(self) -> None:
        """AttentionQuery no more."""
        for handle in self._handles:
            handle.remove()

    def _before(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if model.training:
            self._pictures = ", ".join(
                str(picture.get("file_name", picture.get("image_id", "without a name")))
                for picture in inputs[0]
            )

    def _after(self, model: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        if not model.training:
            return
        losses = {"total_loss": outputs} if isinstance(outputs, Tensor) else outputs
        if not torch.isfinite(sum(losses.values())):
            terms = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
            raise FloatingPointError(f"The loss is not finite: {terms}.")

    @contextmanager
    def explains(self, checkpointer: AtomicCheckpointer) -> Iterator[None]:
        """Say what ends training inside in one sentence, where one is known; in the log as well.

        Raises:
            TrainingError: for full memory, a full disk, a picture that cannot be used, and losses
                or weights that are not finite.
        """

        def without_traceback(record: logging.LogRecord) -> bool:
            sentence = record.exc_info and self._explain(record.exc_info[1], checkpointer)
            if sentence:
                record.msg, record.exc_info = sentence, None
            return True

        logger = logging.getLogger(TrainerBase.__module__)  # it logs what ends training
        logger.addFilter(without_traceback)
        try:
            yield
        except Exception as error:
            sentence = self._explain(error, checkpointer)
            if sentence is None:
                raise
            raise TrainingError(sentence) from error
        finally:
            logger.removeFilter(without_traceback)

    def _explain(
        self, error: Optional[BaseException], checkpointer: AtomicCheckpointer
    ) -> Optional[str]:
        """What an error, or the one that it came from, means; None if that is not known."""
        while error is not None and (reason := self._reason(error, checkpointer.model)) is None:
            error = error.__cause__ or error.__context__
        if error is None:
            return None
        kept = "No checkpoint was written yet."
        if checkpointer.has_checkpoint():
            kept = f"{checkpointer.get_checkpoint_file()} is kept; --resume goes on from it."
        return f"Training stopped at iteration {self.trainer.iter}. {reason} {kept}"

    def _reason(self, error: BaseException, model: nn.Module) -> Optional[str]:
        said = str(error) or type(error).__name__
        if isinstance(error, FloatingPointError):
            return f"{said} {self._seen()} {self._advice(model)}"
        if isinstance(error, TrainingError):
            return said
        if is_out_of_memory(error):
            return (
                f"Memory is full: {said.splitlines()[0]} {self._seen()} Take fewer pictures at "
                f"once (SOLVER.IMS_PER_BATCH, or more SOLVER.ACCUMULATION_STEPS), smaller ones "
                f"(INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN), MODEL.NONLOCAL.SUBSAMPLE True or "
                f"SOLVER.AMP.ENABLED True; on the CPU also fewer DATALOADER.NUM_WORKERS."
            )
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return (
                f"A file could not be written to the end: {said}. Make room, or write fewer "
                f"checkpoints (SOLVER.CHECKPOINT_PERIOD), or to another disk (OUTPUT_DIR)."
            )
        return None

    def _seen(self) -> str:
        process = f"process {comm.get_rank()}" if comm.get_world_size() > 1 else "the model"
        return f"The last pictures that {process} saw: {self._pictures or 'none yet'}."

    def _advice(self, model: nn.Module) -> str:
        wrong = nonfinite_parameters(model)
        why = (
            f"Weights are not finite, {wrong[0]} for one, so that an earlier gradient was not."
            if wrong
            else "Weights are finite: look at the annotations of those pictures."
        )
        return (
            f"{why} A lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or "
            f"SOLVER.CLIP_GRADIENTS.ENABLED True may help."
        )


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
        if isinstance(self._stream, ResumableTrainLoader):
            self._stream.start = start
        if not self.resumes:
            return
        last = truncate_metrics(self._metrics, start) if comm.is_main_process() else None
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
        seed_iteration(self._seed, self.trainer.iter)


def truncate_metrics(path: str, start: int) -> Optional[int]:
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
