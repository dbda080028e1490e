"""What each variant of a suite costs: parameters, FLOPs, time and activation memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.modeling import build_model
from torch import nn

from ..benchmark.detector import train_step
from ..benchmark.flops import analyze, build_for_analysis
from ..config import load_config
from ..engine import Trainer
from .suite import Suite

Batch = list[dict[str, Any]]


def measure_costs(
    suite: Suite, variants: Iterable[str], repeats: int = 7
) -> dict[str, dict[str, float]]:
    """Measure a training step of variants on the first batch of the suite's first task.

    Args:
        suite: Suite to measure.
        variants: Names of the variants to measure.
        repeats: Number of timed steps of each variant; the variants alternate.

    Returns:
        For each variant its ``parameters``, its ``flops`` of inference, the median ``seconds`` of a
        step, and ``bytes``, the activation memory that the backward pass needs.
    """
    task = next(iter(suite.tasks))
    models, costs = {}, {}
    for variant in variants:
        options = list(suite.options(task, variant, suite.seeds[0]))
        cfg = load_config(suite.config, options)
        torch.manual_seed(0)
        models[variant] = build_model(cfg)
        batch = next(iter(Trainer.build_train_loader(cfg)))
        counted = analyze(build_for_analysis(suite.config, options), batch[0]["image"].shape[1:])
        saved = saved_activation_bytes(models[variant], batch)
        costs[variant] = {**counted["total"], "bytes": saved}
    for variant, seconds in _step_seconds(models, batch, repeats).items():
        costs[variant]["seconds"] = statistics.median(seconds)
    return costs


def _step_seconds(
    models: dict[str, nn.Module], batch: Batch, repeats: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {variant: [] for variant in models}
    for _ in range(repeats):
        for variant, model in models.items():
            start = time.perf_counter()
            train_step(model, batch)
            seconds[variant].append(time.perf_counter() - start)
    return seconds


def saved_activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that a training step keeps for its backward pass, in addition to the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        train_step(model, batch)
    return sum(saved.values())
