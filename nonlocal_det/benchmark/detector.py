"""Time that the blocks of a configuration add to its whole detector.

The detector and the one without blocks have the same weights, and new blocks are the identity: both
see the same proposals and predict the same objects. They alternate in one process, and ratios are
taken repetition by repetition. A training step is forward, backward and an SGD step of learning
rate 0, which changes no weight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import load_config
from .measure import peak_memory

Inputs = list[dict[str, object]]


def time_detector(
    config_file: str, size: tuple[int, int], repeats: int, device: str
) -> Iterator[str]:
    """Yield a line for inference and one for training: median seconds and their ratio.

    Args:
        config_file: Path of a YAML file, or its name in the model zoo.
        size: Height and width of the input image in pixels.
        repeats: Number of timed runs of each detector, after one that warms up.
        device: Device to run on, "cpu" or "cuda".

    Raises:
        FileNotFoundError: If the configuration does not exist.
        ValueError: If the configuration has a wrong key, value or position.
    """
    for row in measure_detector(config_file, size, repeats, device):
        low, high = row["ratio_range"]
        yield (
            f"{row['mode']:10} without blocks {row['baseline_seconds']:7.3f} s   "
            f"with blocks {row['blocks_seconds']:7.3f} s   "
            f"ratio {row['ratio']:.3f} (from {low:.3f} to {high:.3f})"
        )


def measure_detector(
    config_file: str, size: tuple[int, int], repeats: int, device: str, mixed: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the measurements of inference, then those of training.

    Args:
        config_file: Path of a YAML file, or its name in the model zoo.
        size: Height and width of the input image in pixels.
        repeats: Number of timed runs of each detector, after one that warms up.
        device: Device to run on, "cpu" or "cuda".
        mixed: Whether to run under autocast, in its default dtype.

    Yields:
        ``mode``; ``baseline_seconds``, ``blocks_seconds`` and ``ratio``, medians; ``ratio_range``,
        the smallest and the largest ratio; on a GPU ``baseline_bytes`` and ``blocks_bytes``, peak
        memory.
    """
    models = build_both(config_file, device)
    inputs = random_input(size, *num_predicted(models["baseline"]))
    for mode, run in (("inference", infer), ("training", train_step)):
        runs = {name: partial(run, model, inputs, mixed) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for i in range(repeats + 1):
            for name in sorted(models, reverse=bool(i % 2)):
                start = time.perf_counter()
                runs[name]()
                seconds[name].append(time.perf_counter() - start)
        baseline, blocks = (seconds[name][1:] for name in ("baseline", "blocks"))
        ratios = [ours / theirs for ours, theirs in zip(blocks, baseline)]
        row = {
            "mode": mode,
            "baseline_seconds": statistics.median(baseline),
            "blocks_seconds": statistics.median(blocks),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
        if device == "cuda":
            row.update({f"{name}_bytes": peak_memory(device, run) for name, run in runs.items()})
        yield row


def build_both(config_file: str, device: str) -> dict[str, nn.Module]:
    """Build a configuration's detector, "blocks", and the same without its blocks, "baseline"."""
    models = {}
    for name, options in (("blocks", []), ("baseline", ["MODEL.NONLOCAL.POSITIONS", "()"])):
        cfg = load_config(config_file, ["MODEL.DEVICE", device, *options])
        torch.manual_seed(0)
        models[name] = build_model(cfg)
    models["blocks"].load_state_dict(models["baseline"].state_dict(), strict=False)
    return models


def num_predicted(model: nn.Module) -> tuple[int, int]:
    """Numbers of classes and of keypoints that a detector predicts; 1 where it has none."""
    heads = getattr(model, "roi_heads", model)
    keypoints = getattr(heads, "keypoint_head", None)
    return getattr(heads, "num_classes", 1), getattr(keypoints, "num_keypoints", 1)


def random_input(
    size: tuple[int, int], num_classes: int, num_keypoints: int = 1, num_objects: int = 8
) -> Inputs:
    """Make a batch of one image of noise, with annotated squares.

    Args:
        size: Height and width of the image in pixels.
        num_classes: Number of classes of the squares.
        num_keypoints: Number of keypoints in each of them.
        num_objects: Number of squares.
    """
    generator = torch.Generator().manual_seed(0)
    side = min(size) // 4
    corners = torch.rand(num_objects, 2, generator=generator)
    corners = corners * torch.tensor([size[1] - side, size[0] - side])
    boxes = torch.cat([corners, corners + side], dim=1)
    masks = torch.zeros(num_objects, *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    classes = torch.randint(num_classes, (num_objects,), generator=generator)
    truth = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes, gt_masks=BitMasks(masks))
    centers = (corners + side / 2)[:, None].expand(-1, num_keypoints, -1)
    visible = torch.full((num_objects, num_keypoints, 1), 2.0)
    truth.gt_keypoints = Keypoints(torch.cat([centers, visible], dim=2))
    image = torch.randint(256, (3, *size), generator=generator).float()
    stuff = torch.zeros(size, dtype=torch.long)
    return [
        {"image": image, "instances": truth, "sem_seg": stuff, "height": size[0], "width": size[1]}
    ]


def infer(model: nn.Module, inputs: Inputs, mixed: bool = False) -> None:
    """Run inference and wait for the device."""
    with torch.no_grad(), torch.autocast(_device(model), enabled=mixed):
        model.eval()(inputs)
    _synchronize()


def train_step(model: nn.Module, inputs: Inputs, mixed: bool = False) -> None:
    """Run a training step that changes no weight, and wait for the device.

    In mixed precision, a step whose gradients are not finite is left out, as in training.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler(_device(model), init_scale=1.0, enabled=mixed)
    with torch.autocast(_device(model), enabled=mixed):
        losses = training_losses(model, inputs)
    scaler.scale(sum(losses.values())).backward()
    scaler.step(optimizer)
    optimizer.zero_grad()
    _synchronize()


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def training_losses(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Losses of a training step that samples the same anchors and boxes in each call."""
    torch.manual_seed(0)
    with EventStorage():
        return model.train()(inputs)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
