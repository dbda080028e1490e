"""Training hooks: error messages that say what to change, and bit-exact resuming."""

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

from ..checkpoint.atomic_checkpoint import AtomicCheckpointer, nonfinite_tensors
from ..data.train_loader import ResumableTrainLoader, seed_iteration
from ..errors import TrainingError, is_out_of_memory

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SMOOTHING_WINDOW = 20  # number of values over which detectron2's writers take a scalar's median
# Scalars that are measured again: detectron2 measures them from the third iteration on, and until
# then a restored value would get a line of its own in the metrics.
_TIMING_SCALARS = ("time", "eta_seconds")


class TrainingErrorHook(HookBase):
    """Stops training at a loss that is not finite, and explains known errors.

    It observes the model's inputs and outputs, so it works with any trainer. A loss is checked
    before any weight changes.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._last_images = ""

    def before_train(self) -> None:
        """Register the hooks on the model."""
        model = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def after_train(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training:
            images = next(iter((*args, *kwargs.values())))
            self._last_images = ", ".join(
                str(image.get("file_name", image.get("image_id", "unnamed"))) for image in images
            )

    def _after(self, model: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        if not model.training:
            return
        losses = {"total_loss": outputs} if isinstance(outputs, Tensor) else outputs
        if not torch.isfinite(sum(losses.values())):
            terms = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
            raise FloatingPointError(f"The loss is not finite: {terms}.")

    @contextmanager
    def report_errors(self, checkpointer: AtomicCheckpointer) -> Iterator[None]:
        """Replace known errors within the body by a `TrainingError`, also in the log.

        Args:
            checkpointer: Checkpointer of the run; the message names its last checkpoint.

        Raises:
            TrainingError: If memory is exhausted, the disk is full, an image cannot be loaded, or
                losses or weights are not finite.
        """

        def without_traceback(record: logging.LogRecord) -> bool:
            message = record.exc_info and self._explain(record.exc_info[1], checkpointer)
            if message:
                record.msg, record.exc_info = message, None
            return True

        logger = logging.getLogger(TrainerBase.__module__)  # it logs the error that ends training
        logger.addFilter(without_traceback)
        try:
            yield
        except Exception as error:
            message = self._explain(error, checkpointer)
            if message is None:
                raise
            raise TrainingError(message) from error
        finally:
            logger.removeFilter(without_traceback)

    def _explain(
        self, error: Optional[BaseException], checkpointer: AtomicCheckpointer
    ) -> Optional[str]:
        """Return the message for an error or its cause; None if neither is a known one."""
        while error is not None and (reason := self._reason(error, checkpointer.model)) is None:
            error = error.__cause__ or error.__context__
        if error is None:
            return None
        path = checkpointer.kept_checkpoint()
        kept = (
            f"{path} is kept; --resume continues from it."
            if path
            else "No checkpoint has been written yet."
        )
        return f"Training stopped at iteration {self.trainer.iter}. {reason} {kept}"

    def _reason(self, error: BaseException, model: nn.Module) -> Optional[str]:
        text = str(error) or type(error).__name__
        if isinstance(error, FloatingPointError):
            return f"{text} {self._images_seen()} {self._divergence_hint(model)}"
        if isinstance(error, TrainingError):
            return text
        if is_out_of_memory(error):
            return (
                f"Out of memory: {text.splitlines()[0]} {self._images_seen()} Use fewer images per "
                f"micro-batch (SOLVER.IMS_PER_BATCH, or more SOLVER.ACCUMULATION_STEPS), smaller "
                f"images (INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN), MODEL.NONLOCAL.SUBSAMPLE "
                f"True or SOLVER.AMP.ENABLED True; on the CPU also fewer DATALOADER.NUM_WORKERS."
            )
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return (
                f"A file could not be written completely: {text}. Free disk space, or write fewer "
                f"checkpoints (SOLVER.CHECKPOINT_PERIOD), or to another disk (OUTPUT_DIR)."
            )
        return None

    def _images_seen(self) -> str:
        where = f"on rank {comm.get_rank()}" if comm.get_world_size() > 1 else "in the model"
        return f"The last images {where}: {self._last_images or 'none yet'}."

    def _divergence_hint(self, model: nn.Module) -> str:
        nonfinite = nonfinite_tensors(model)
        cause = (
            f"Weights are not finite ({nonfinite[0]}, for example), so an earlier gradient was not."
            if nonfinite
            else "Weights are finite: check the annotations of those images."
        )
        return (
            f"{cause} A lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or "
            f"SOLVER.CLIP_GRADIENTS.ENABLED True may help."
        )


class ResumeHook(HookBase):
    """Makes a resumed run bit-exact with one that was never stopped.

    Weights, optimizer and schedule are in detectron2's checkpoints. This hook also restores data
    order and per-iteration random numbers, and truncates ``metrics.json`` so that every iteration
    appears once. Hooks interrupted right after a checkpoint, such as evaluation, are re-run.

    Args:
        train_loader: Training loader; one that is not resumable restarts from the beginning.
        seed: Seed of the random numbers of each iteration; the same on all ranks.
        output_dir: Directory of ``metrics.json``.
        hooks_after_checkpoint: Hooks that run after the one that saves checkpoints, and before this
            one.

    Attributes:
        is_resumed: Whether this run resumes the one in the output directory; if not, its
            ``metrics.json`` is not truncated.
    """

    def __init__(
        self,
        train_loader: Any,
        seed: int,
        output_dir: str,
        hooks_after_checkpoint: list[HookBase],
    ) -> None:
        self._train_loader = train_loader
        self._seed = seed
        self._metrics_file = os.path.join(output_dir, "metrics.json")
        self._hooks_after_checkpoint = hooks_after_checkpoint
        self._scalars: dict[str, Any] = {}
        self.is_resumed = False

    def state_dict(self) -> dict[str, Any]:
        """Return the latest values of all scalars, for the medians in the next line of metrics."""
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        return {
            "scalars": {
                name: {"values": history.values()[-_SMOOTHING_WINDOW:], "smoothing": hints[name]}
                for name, history in storage.histories().items()
                if name not in _TIMING_SCALARS
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the scalars until training starts."""
        self._scalars = state["scalars"]

    def before_train(self) -> None:
        """Restore data order, metrics and scalars, and re-run interrupted hooks."""
        start = self.trainer.start_iter
        if isinstance(self._train_loader, ResumableTrainLoader):
            self._train_loader.start_batch = start
        if not self.is_resumed:
            return
        goes_on = start < self.trainer.max_iter  # if not, only the evaluation at the end runs again
        last = None
        if comm.is_main_process():
            last = truncate_metrics(self._metrics_file, start, keep_evaluation=goes_on)
        last = comm.all_gather(last)[0]
        if start:
            written = -1 if last is None else last
            self._restore_scalars(min(written, start - 2) if goes_on else written)
            self._rerun_pending_hooks(start - 1, last)

    def _restore_scalars(self, after: int) -> None:
        """Restore the scalars whose latest value is of an iteration after the given one."""
        storage = self.trainer.storage
        for name, scalar in self._scalars.items():
            if scalar["values"][-1][1] > after:
                for value, put_at in scalar["values"]:
                    storage.iter = put_at
                    storage.put_scalar(name, value, smoothing_hint=scalar["smoothing"])

    def _rerun_pending_hooks(self, iteration: int, written: Optional[int]) -> None:
        """Run the hooks after the checkpoint of an iteration, unless its metrics were written."""
        # If no iteration is left, the trainer continues counting from here.
        self.trainer.iter = self.trainer.storage.iter = iteration
        if written is None or written < iteration:
            for hook in self._hooks_after_checkpoint:
                hook.after_step()

    def before_step(self) -> None:
        """Seed the random number generators for the iteration."""
        seed_iteration(self._seed, self.trainer.iter)


def truncate_metrics(path: str, start: int, *, keep_evaluation: bool = False) -> Optional[int]:
    """Truncate ``metrics.json`` after its last line of an iteration before ``start``.

    The evaluation at the end of a run is logged under the iteration that would have been next.

    The file is changed in place: detectron2 has opened it already, to append.

    Args:
        path: Path of the file, which need not exist.
        start: First iteration of the resumed run.
        keep_evaluation: Whether to keep an evaluation at the end of a run that ended at ``start``.

    Returns:
        Iteration of the last line that remains; None if none does.
    """
    if not os.path.isfile(path):
        return None
    last, end, offset = None, 0, 0
    with open(path, "rb+") as file:
        for line in file:
            offset += len(line)
            row = _parse_metrics(line)
            iteration = row.get("iteration", start + 1)
            is_evaluation = iteration == start and not any(map(_is_of_training, row))
            if iteration < start or keep_evaluation and is_evaluation:
                last, end = iteration, offset
        file.truncate(end)
    return last


def _is_of_training(scalar: str) -> bool:
    """Whether a scalar is written during an iteration, not by an evaluation after the last."""
    return scalar == "total_loss" or scalar.startswith(("health/", "attention/"))


def _parse_metrics(line: bytes) -> dict[str, Any]:
    """Return the metrics of a line; none if the line is incomplete."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
