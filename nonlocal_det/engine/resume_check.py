"""Checks of a run that is to be resumed: its checkpoint, and the settings that have changed."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn as nn
from detectron2.config import CfgNode

from ..config import differing_settings
from .model_check import load_silently


def check_resumable(path: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that a checkpoint was saved by a run with the same model and optimizer.

    Args:
        path: Path of the checkpoint.
        model: Model of this run, as far as it has memory; its weights change.
        optimizer: Optimizer of that model; its state changes.

    Raises:
        ValueError: If model or optimizer are others.
    """
    report, rest = load_silently(path, model, "The checkpoint")
    advice = "use the options of that run, or choose another output directory."
    if not report.is_complete:
        raise ValueError(
            f"--resume cannot continue from {path!r}, a checkpoint of another model "
            f"({str(report).rstrip('.')}): {advice}"
        )
    trainer = rest.get("trainer", {})
    state = trainer.get("_trainer", trainer).get("optimizer")  # of Trainer, or of LazyTrainer
    if state is not None and not _fits(optimizer, state):
        raise ValueError(
            f"--resume cannot continue from {path!r}, a checkpoint of another optimizer or with "
            f"other frozen parameters: {advice}"
        )


def _fits(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> bool:
    """Whether a state is one of this kind of optimizer, with as many parameters."""
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError):
        return False
    # Settings that are new in a version of torch are filled in; those of another kind are missing.
    return all(group.keys() >= optimizer.defaults.keys() for group in optimizer.param_groups)


def changed_settings(cfg: CfgNode) -> list[str]:
    """Describe the settings that differ from those in ``config.yaml`` of the output directory.

    Args:
        cfg: Config of the run.

    Returns:
        A phrase per setting, as in "SEED 2 (was 1)"; none if there is no readable ``config.yaml``.
    """
    try:
        differing = differing_settings(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), cfg)
    except (OSError, ValueError):
        return []
    return [
        f"{key} {value!r} (was {earlier!r})"
        for key, (earlier, value) in differing.items()
        if key != "OUTPUT_DIR"
    ]
