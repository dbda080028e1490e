"""The training loop: gradient accumulation and mixed precision."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
import torch.nn as nn
from detectron2.engine import SimpleTrainer
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..layers.casting import accum_dtype
from ..utils.deprecation import renamed_arguments
from ..utils.validation import check_choice
from .launch import SkipEvalOnErrorMixin

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_amp_dtype(enabled: bool, name: str, key: str, device: str) -> Optional[torch.dtype]:
    """Return the dtype of mixed precision training.

    Args:
        enabled: Whether mixed precision is enabled.
        name: Name of the dtype, one of `AMP_DTYPES`.
        key: Config key of the name, for the error message.
        device: Device to train on.

    Returns:
        The dtype; None if mixed precision is disabled.

    Raises:
        ValueError: If there is no such dtype, or the device cannot train in it.
    """
    if not enabled:
        return None
    check_choice(key, name, tuple(AMP_DTYPES))
    if device == "cpu" and name == "float16":
        raise ValueError(f"{key} is 'float16', which needs a GPU; on a CPU it must be 'bfloat16'.")
    return AMP_DTYPES[name]


class GradAccumTrainer(SkipEvalOnErrorMixin, SimpleTrainer):
    """detectron2's SimpleTrainer and AMPTrainer in one, with gradient accumulation.

    Each batch is split into equal micro-batches whose gradients are averaged, which is equivalent
    to data-parallel training with one micro-batch per rank. Gradients are all-reduced only in the
    last micro-batch.

    Args:
        model: Model that returns a dict of losses in training mode.
        data_loader: Iterable over this process's batches; a batch is a list of dataset dicts.
        optimizer: Optimizer of the model's parameters.
        accumulation_steps: Number of micro-batches per optimizer step; divides the batch size.
        precision: Dtype of mixed precision, torch.float16 (GPU only) or torch.bfloat16; None
            trains in float32.
    """

    @renamed_arguments(passes="accumulation_steps")
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
        # bfloat16 has the range of float32: its gradients need no scaling.
        scaled = precision == torch.float16
        self.grad_scaler = torch.amp.GradScaler(self.device, enabled=scaled)
        if precision is not None:
            _pool_in_float32(model)

    def run_step(self) -> None:
        """Run one iteration; losses are logged, and checked to be finite, before the update."""
        assert self.model.training, "the model was put into evaluation mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        micro_batches = self._split(batch)
        with self._no_sync():
            losses = [self._micro_step(micro_batch) for micro_batch in micro_batches[:-1]]
        losses.append(self._micro_step(micro_batches[-1]))
        if hasattr(self, "after_backward"):  # detectron2 0.5 has no such hooks
            self.after_backward()

        self._write_metrics(_mean(losses), data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _split(self, batch: list[Any]) -> list[list[Any]]:
        size, rest = divmod(len(batch), self.accumulation_steps)
        assert size and not rest, (len(batch), self.accumulation_steps)
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Return a context without gradient synchronization between processes."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _micro_step(self, micro_batch: list[Any]) -> dict[str, Tensor]:
        """Accumulate the gradients of one micro-batch; return its losses."""
        with torch.autocast(self.device, self.precision, enabled=self.precision is not None):
            losses = self.model(micro_batch)
            if isinstance(losses, Tensor):
                losses = {"total_loss": losses}
            total = sum(losses.values()) / self.accumulation_steps
        self.grad_scaler.scale(total).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state; with gradient scaling, it is that of detectron2's AMPTrainer."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also one of training in another precision, whose scale is ignored."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _mean(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}


def _pool_in_float32(model: nn.Module) -> None:
    """Let RoI pooling read its features in float32.

    Otherwise ROIPooler would cast boxes to the feature dtype, and bfloat16 represents coordinates
    between 512 and 1024 only in steps of 4 pixels.
    """

    def upcast(pooler: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        features, *rest = inputs
        return ([x.to(accum_dtype(x)) for x in features], *rest)

    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(upcast)
