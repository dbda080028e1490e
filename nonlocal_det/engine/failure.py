"""When a run cannot start or go on: one sentence that says where, why and what to change."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import detectron2.utils.comm as comm
import torch
import torch.nn as nn
from detectron2.engine import HookBase, TrainerBase
from torch import Tensor

from .checkpoint import WholeCheckpointer, not_finite

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# As CUDA, torch on CPUs, OpenCV, the C++ library, and torch of a loading process say it.
_MEMORY_FULL = re.compile(
    r"out of memory|allocate memory|not enough memory|insufficient memory|bad_alloc"
    r"|worker .*killed by signal",
    re.IGNORECASE,
)


@contextmanager
def one_sentence_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with what a wrong input raised, as one sentence, and exit code 1.

    Args:
        kinds: of errors that speak for themselves; by default ValueError and OSError.
    """
    expected = kinds or (ValueError, OSError)
    try:
        yield
    except expected as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")


class RunFailure(RuntimeError):
    """A run stopped for a reason that the message, one sentence or more, explains."""


def memory_is_full(error: BaseException) -> bool:
    """Whether an error says so, of the GPU or of the machine."""
    return isinstance(error, MemoryError) or bool(_MEMORY_FULL.search(str(error)))


class FailureGuard(HookBase):
    """Ends training, before a weight changes, when a loss is not finite; explains what ends it.

    It looks at what goes into the model and what comes out, so it works with any trainer, however
    that takes its steps.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._pictures = ""

    def before_train(self) -> None:
        """Look from now on."""
        model = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after),
        ]

    def after_train(self) -> None:
        """Look no more."""
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
    def explains(self, checkpointer: WholeCheckpointer) -> Iterator[None]:
        """Say what ends training inside in one sentence, where one is known; in the log as well.

        Raises:
            RunFailure: for full memory, a full disk, a picture that cannot be used, and losses
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
            raise RunFailure(sentence) from error
        finally:
            logger.removeFilter(without_traceback)

    def _explain(
        self, error: Optional[BaseException], checkpointer: WholeCheckpointer
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
        if isinstance(error, RunFailure):
            return said
        if memory_is_full(error):
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
        wrong = not_finite(model)
        why = (
            f"Weights are not finite, {wrong[0]} for one, so that an earlier gradient was not."
            if wrong
            else "Weights are finite: look at the annotations of those pictures."
        )
        return (
            f"{why} A lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or "
            f"SOLVER.CLIP_GRADIENTS.ENABLED True may help."
        )
