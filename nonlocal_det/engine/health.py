"""A training hook that tells when a block is dead, is saturated, or adds far more than it gets."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import detectron2.utils.comm as comm
import torch.nn as nn
from detectron2.engine import HookBase

from ..attention.recording.block_health import BlockHealth, HealthMeter

_FIRST_ITERATIONS = (100, 1000)
_LEARNED_BY = 100  # a new block is the identity; after so many iterations it should not be
SATURATED_BELOW = 0.05  # of the entropy of a uniform map
BLOWS_UP_ABOVE = 10  # times the norm of the input; blocks that learn well add up to twice it


class HealthHook(HookBase):
    """Logs the health of all blocks at iterations 100, 1000 and at each checkpoint.

    It warns of each block that is dead, saturated or blows up, unless it is frozen, and puts
    ``health/<block>/residual_ratio`` and ``health/<block>/entropy`` into the storage. Of these
    training steps themselves the first call of each block is measured, on the main process only;
    see `nonlocal_det.attention.recording.block_health`. Training is not affected, to the bit.

    It goes before the hook that saves checkpoints, so that they have its scalars, and before the
    writers.

    Args:
        checkpoint_period: Number of iterations between two checkpoints; the last iteration has one.
    """

    def __init__(self, checkpoint_period: int) -> None:
        self._period = checkpoint_period
        self._meter = HealthMeter()

    @property
    def _model(self) -> nn.Module:
        model = self.trainer.model
        return getattr(model, "module", model)  # of DistributedDataParallel

    def before_step(self) -> None:
        """Attach to the blocks, if it is time."""
        iteration = self.trainer.iter + 1
        is_due = iteration in (*_FIRST_ITERATIONS, self.trainer.max_iter)
        if comm.is_main_process() and (is_due or iteration % self._period == 0):
            self._meter.attach(self._model)

    def after_step(self) -> None:
        """Detach, and tell what was measured."""
        if self._meter.detach() and self._meter.found:
            self._log(self.trainer.iter + 1)
            self._put_scalars()

    def after_train(self) -> None:
        """Detach, if the last step failed."""
        self._meter.detach()

    def _log(self, iteration: int) -> None:
        found, logger = self._meter.found, logging.getLogger("detectron2")
        blocks = "; ".join(f"{name} {_summary(health)}" for name, health in found.items())
        logger.info(f"Blocks at iteration {iteration}: {blocks}")
        for name, health in found.items():
            if not self._model.get_submodule(name).frozen:
                for problem in _problems(health, iteration):
                    logger.warning(f"{name} {problem}")

    def _put_scalars(self) -> None:
        for name, health in self._meter.found.items():
            for tag in ("residual_ratio", "entropy"):
                value = getattr(health, tag)
                if not math.isnan(value):
                    self.trainer.storage.put_scalar(
                        f"health/{name}/{tag}", value, smoothing_hint=False
                    )


def _summary(health: BlockHealth) -> str:
    added = f"adds {health.residual_ratio:.2g} of its input"
    if math.isnan(health.entropy):
        return added
    return f"{added}, entropy {health.entropy:.2g} of uniform"


def _problems(health: BlockHealth, iteration: int) -> Iterator[str]:
    """What is wrong with a block, and what to change."""
    if health.is_identity and iteration >= _LEARNED_BY:
        yield (
            f"is dead: at iteration {iteration} its output still equals its input. Check that its "
            f"learning rate is not zero, that neither its weights nor the gamma of its NORM are "
            f"frozen, and that a loss depends on its position."
        )
    if health.entropy < SATURATED_BELOW:
        yield (
            f"is saturated: the entropy of its attention is {health.entropy:.2g} of a uniform "
            f"one's, so that what computes the attention (theta, phi) gets no gradient. QK_NORM, "
            f"SCALE True or a lower learning rate keep the logits small."
        )
    if health.residual_ratio > BLOWS_UP_ABOVE:
        yield (
            f"blows up: what it adds has {health.residual_ratio:.2g} times the norm of its input. "
            f"Add a norm after its output convolution (NORM BN, SyncBN or GN), or lower the "
            f"learning rate."
        )
