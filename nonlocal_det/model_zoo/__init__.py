"""Configurations and models by name, as in detectron2's own ``model_zoo``.

A name is a path relative to the project's ``configs/``, such as "mask_rcnn_R50_NL.yaml" or
"lazy/mask_rcnn_R50_NL.py"; its ending may be left out. No trained weights are published yet.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint.detection_checkpoint import NonLocalCheckpointer
from ..config import load_config, load_lazy_config
from ..utils.config_files import find_in_zoo, nearest_in_zoo, zoo_names

__all__ = ["get", "get_config", "get_config_file", "zoo_names"]


def get_config_file(name: str) -> str:
    """Path of a configuration file.

    Args:
        name: Name of the configuration, such as "mask_rcnn_R50_NL.yaml".

    Raises:
        FileNotFoundError: If the zoo has no such configuration, with the nearest that it has.
    """
    found = find_in_zoo(name)
    if found is None:
        raise FileNotFoundError(
            f"The model zoo has no configuration {name!r}; the nearest are {nearest_in_zoo(name)}."
        )
    return found


def get_config(name: str, trained: bool = False) -> Any:
    """A configuration.

    Args:
        name: Name of the configuration, such as "mask_rcnn_R50_NL.yaml".
        trained: Whether the configuration shall name trained weights; there are none yet. Without,
            it names the weights that training starts from.

    Returns:
        A ``CfgNode`` for a YAML file, a ``DictConfig`` for a LazyConfig.

    Raises:
        FileNotFoundError: If the zoo has no such configuration, with the nearest that it has.
        ValueError: If trained weights are asked for.
    """
    file = get_config_file(name)
    if trained:
        raise ValueError(
            f"No trained weights of {name!r} are published yet: use trained=False, or train it."
        )
    return load_lazy_config(file) if file.endswith(".py") else load_config(file)


def get(name: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """A model in training mode, with the weights that its configuration names loaded.

    Args:
        name: Name of the configuration, such as "mask_rcnn_R50_NL.yaml".
        trained: As in `get_config`.
        device: Device to build the model on; by default the configuration's, or the CPU where there
            is no GPU.

    Raises:
        FileNotFoundError: If the zoo has no such configuration, with the nearest that it has.
        ValueError: If trained weights are asked for.
    """
    cfg = get_config(name, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model = instantiate(cfg.model).to(device or cfg.train.device)
        weights = cfg.train.init_checkpoint
    NonLocalCheckpointer(model).load(weights)
    return model
