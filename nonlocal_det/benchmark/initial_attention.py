"""The attention with which a configuration's blocks start to train, on an image.

With its initial weights, if they are a local file. Otherwise weights are random, and with the fixed
statistics of a frozen batch norm features would grow with every layer: all batch norms get the
statistics of the image itself.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import AugInput, ResizeShortestEdge
from torch import Tensor, nn

from ..attention.recording.block_health import BlockHealth, HealthMeter
from ..checkpoint.detection_checkpoint import NonLocalCheckpointer
from ..config import load_config, load_lazy_config
from ..engine.health import SATURATED_BELOW
from ..utils.config_files import find_config_file


def initial_attention(
    model: nn.Module, weights: str, image_file: str, size: tuple[int, int]
) -> dict[str, BlockHealth]:
    """Measure the attention of a model's blocks on an image.

    Args:
        model: Detectron2 model on a CPU; its weights, or its norms' statistics, are changed.
        weights: File of weights; "" for those that the model has.
        image_file: Path of the image.
        size: Height and width in pixels into which the image is resized, keeping its shape.

    Returns:
        Health by name, of the blocks with a softmax that ran.
    """
    if weights:
        NonLocalCheckpointer(model).load(weights)
    else:
        for module in model.modules():
            if hasattr(module, "running_mean"):
                module.register_forward_pre_hook(_take_statistics)
    augmented = AugInput(read_image(image_file, getattr(model, "input_format", None) or "BGR"))
    ResizeShortestEdge(min(size), max(size))(augmented)
    image = torch.as_tensor(augmented.image.transpose(2, 0, 1).copy())
    meter = HealthMeter()
    meter.attach(model)
    with torch.no_grad():
        model.eval()([{"image": image}])
    meter.detach()
    return {name: found for name, found in meter.found.items() if not math.isnan(found.entropy)}


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Give a batch norm the statistics of its input."""
    var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


def initial_weights(config_file: str, options: list[str]) -> str:
    """The local file of weights that a configuration trains from, or "".

    Args:
        config_file: Path of a YAML file or a LazyConfig, or its name in the model zoo.
        options: KEY VALUE pairs over a YAML file, KEY=VALUE over a LazyConfig.

    Raises:
        FileNotFoundError: If the configuration or a local file of weights does not exist.
        ValueError: If a key or value is wrong.
    """
    config_file = find_config_file(config_file)
    if config_file.endswith(".py"):
        weights = load_lazy_config(config_file, options).get("train", {}).get("init_checkpoint", "")
    else:
        weights = load_config(config_file, options).MODEL.WEIGHTS
    if "://" in weights:
        return ""
    if weights and not os.path.isfile(weights):
        raise FileNotFoundError(f"There is no file of weights {weights!r}.")
    return weights


def attention_table(found: dict[str, BlockHealth]) -> str:
    """The result of `initial_attention` as text, one line for each block."""
    width = max(map(len, found), default=0)
    lines = [f"{'':<{width}}{'entropy / uniform':>20}{'largest weight':>17}"]
    for name, health in found.items():
        state = "  saturated" if health.entropy < SATURATED_BELOW else ""
        lines.append(f"{name:<{width}}{health.entropy:>20.3f}{health.max_weight:>17.3f}{state}")
    return "\n".join(lines)


def attention_json(found: dict[str, BlockHealth]) -> dict[str, Any]:
    """The result of `initial_attention` as JSON."""
    return {n: {"entropy": h.entropy, "max_weight": h.max_weight} for n, h in found.items()}
