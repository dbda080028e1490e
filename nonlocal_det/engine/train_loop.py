"""One step of the optimiser: in several passes, and in half precision, where that is asked for."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any, Optional

import torch
import torch.nn as nn
from detectron2.engine import SimpleTrainer
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..layers.casting import accum_dtype
from ..utils.validation import check_choice
from .launch import SkipEvalOnErrorMixin

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_amp_dtype(key: str, name: str, device: str) -> torch.dtype:
    """The dtype of that name; the key under which it was given is for the message.

    Raises:
        ValueError: if it is no choice, or cannot be trained in on that device.
    """
    check_choice(key, name, tuple(PRECISIONS))
    if device == "cpu" and name == "float16":
        raise ValueError(f"{key} is 'float16', which needs a GPU; on a CPU it must be 'bfloat16'.")
    return PRECISIONS[name]


class GradAccumTrainer(SkipEvalOnErrorMixin, SimpleTrainer):
    """detectron2's SimpleTrainer and AMPTrainer in one, with gradients accumulated over passes.

    The batch is cut into equal parts, and the gradients of their losses are averaged: those of
    as many processes with one part each. Only the last pass waits for the other processes.

    Args:
        model: gives a dict of losses in training.
        data_loader: gives this process's pictures of one step, a list.
        optimizer: of the model's parameters.
        accumulation_steps: Number of micro-batches per optimizer step; it divides the batch size.
        precision: torch.float16, on GPUs, or torch.bfloat16, for what may be computed in it; None
            for all in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation_steps: int = 1,
        precision: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.accumulation_steps = accumulation_steps
        self.precision = precision
        self.device = next(model.parameters()).device.type
        # bfloat16 has the range of float32: there is nothing to scale.
        scales = precision == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self.device, enabled=scales)
        if precision is not None:
            _pool_exactly(model)

    def run_step(self) -> None:
        """Take one step. Losses are written, and seen to be finite, before a weight changes."""
        assert self.model.training, "the model was put into evaluation mode"
        start = time.perf_counter()
        pictures = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        each = len(pictures) // self.accumulation_steps
        assert each * self.accumulation_steps == len(pictures), (
            len(pictures),
            self.accumulation_steps,
        )
        parts = [pictures[i : i + each] for i in range(0, len(pictures), each)]
        with self._alone():
            losses = [self._pass(part) for part in parts[:-1]]
        losses.append(self._pass(parts[-1]))
        if hasattr(self, "after_backward"):  # detectron2 0.5 has no such hooks
            self.after_backward()

        self._write_metrics(_mean(losses), data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _alone(self) -> Any:
        """Without the exchange of gradients between processes."""
        several = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if several else nullcontext()

    def _pass(self, pictures: list[Any]) -> dict[str, Tensor]:
        """Add one part's share of the gradients; its losses."""
        with torch.autocast(self.device, self.precision, enabled=self.precision is not None):
            losses = self.model(pictures)
            if isinstance(losses, Tensor):
                losses = {"total_loss": losses}
            share = sum(losses.values()) / self.accumulation_steps
        self.grad_scaler.scale(share).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """As detectron2's: of AMPTrainer, where gradients are scaled."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of a run in another precision, whose scale then says nothing."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _mean(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}


def _pool_exactly(model: nn.Module) -> None:
    """Let RoI pooling read its features in float32.

    It rounds boxes to the features' dtype, and at 800 pixels bfloat16 counts in steps of 4.
    """

    def upcast(pooler: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        features, *rest = inputs
        return ([x.to(accum_dtype(x)) for x in features], *rest)

    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(upcast)
