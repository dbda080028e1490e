"""A small network without a detector, which learns only if its block does.

Five convolutions, one block, one more convolution, and a classifier that reads the features at an
object's center; it sees 47 pixels to each side without the block. A run takes a minute on one core,
so that a setting can be tried with many seeds before a detector is trained with it.

Tasks, on images of 64 x 320 pixels from `nonlocal_det.data.lamps`, where a shape's class is

- match: the color of the lamp whose core has the tone of the shape, or none;
- far: the color of the image's only lamp;
- local: its outline.

Lamps are objects of these classes, too, but no accuracy counts them: they need no block. The
convolutions before the block learn with it, from scratch in the tasks far and local. In the task
match they start from those of a network without a block that tells the tones, as a detector starts
from pretrained weights: from scratch, few networks find out in so short a training what to match.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..attention.recording.statistics import relative_entropy
from ..data.builtin import DATASETS
from ..data.lamps.generator import render_scene
from ..data.lamps.writer import image_rng
from ..layers import NonLocalBlock
from ..layers.base import NonLocalBase
from ..modeling.block_factory import build_block
from .results import LEARNED

STRIDE = 16  # pixels per position of the features
WIDTH = 96  # channels of the features
BATCH = 16  # images per step

_IMAGES = replace(
    DATASETS["lamps_long"].params,
    width=(320, 320),
    num_shapes=(3, 4),
    shape_size=(24.0, 36.0),
    lamp_size=(22.0, 26.0),
    halo=1.8,
)
_MATCHES = replace(_IMAGES, decided_by="match", num_shapes=(6, 7), shape_size=(20.0, 26.0))
TASKS = {
    "match": _MATCHES,
    "far": _IMAGES,
    "local": replace(_IMAGES, decided_by="outline"),
    "tones": replace(_MATCHES, decided_by="tone"),
}
PRETRAINING = {"match": "tones"}  # the task of the network whose first convolutions it starts with


@dataclass(frozen=True)
class Examples:
    """Images with their objects.

    Attributes:
        images: RGB (I, 3, H, W), uint8 or, in a batch, float.
        cells: Integer (O, 3), the image, row and column of the position at each object's center.
        classes: Integer (O,), the class of each object.
        is_shape: Boolean (O,), False for lamps.
    """

    images: Tensor
    cells: Tensor
    classes: Tensor
    is_shape: Tensor

    def batch(self, chosen: Tensor) -> Examples:
        """Chosen images, as floats from -1 to 1, and their objects."""
        images = self.images[chosen].float() / 127.5 - 1
        place = torch.full((len(self.images),), -1)
        place[chosen] = torch.arange(len(chosen))
        kept = place[self.cells[:, 0]] >= 0
        cells = torch.cat([place[self.cells[kept, :1]], self.cells[kept, 1:]], dim=1)
        return Examples(images, cells, self.classes[kept], self.is_shape[kept])


@cache
def make_examples(task: str, split: str, count: int) -> Examples:
    """Render the images of a task.

    Args:
        task: Name of a task, one of ``TASKS``.
        split: Name of a split; different names give different images.
        count: Number of images.
    """
    images, cells, classes, is_shape = [], [], [], []
    for index in range(count):
        scene = render_scene(image_rng(0, split, index), TASKS[task])
        images.append(torch.from_numpy(scene.image).permute(2, 0, 1))
        for number, instance in enumerate(scene.instances, start=1):
            is_shape.append(number <= len(scene.instances) - len(scene.lamps))
            x, y = (instance.polygon.min(axis=0) + instance.polygon.max(axis=0)) / 2
            cells.append([index, int(y) // STRIDE, int(x) // STRIDE])
            classes.append(instance.category)
    objects = map(torch.tensor, (cells, classes, is_shape))
    return Examples(torch.stack(images), *objects)


class SmallNetwork(nn.Module):
    """The network.

    Args:
        classes: Number of classes.
        block: Block of ``WIDTH`` channels, or None.
    """

    def __init__(self, classes: int, block: Optional[NonLocalBase]) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, WIDTH, WIDTH)
        self.features = nn.Sequential(
            *(
                layer
                for i, (width, after) in enumerate(zip(widths, widths[1:]))
                for layer in _convolution(width, after, stride=2 if i < 4 else 1)
            )
        )
        self.block = block or nn.Identity()
        self.head = nn.Sequential(*_convolution(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, classes, 1))

    def forward(self, images: Tensor, cells: Tensor) -> Tensor:
        """Class logits (O, classes) at cells (O, 3) of images (B, 3, H, W)."""
        logits = self.head(self.block(self.features(images)))
        return logits[cells[:, 0], :, cells[:, 1], cells[:, 2]]


def _convolution(channels: int, after: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, after, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU()]


def train(
    task: str,
    settings: Optional[Mapping[str, Any]],
    seed: int,
    *,
    steps: int = 600,
    images: int = 1500,
    rate: float = 0.002,
) -> dict[str, Any]:
    """Train the network once and evaluate it on 300 other images.

    Args:
        task: Name of a task, one of ``TASKS``.
        settings: Settings of the block, keys of ``MODEL.NONLOCAL`` in lower case; None for none.
        seed: Random seed of the weights and of the order of the images; not of the pretraining.
        steps: Number of optimizer steps: AdamW, one cycle, gradients clipped to 0.5. Half as many
            come before, if the task has a pretraining.
        images: Number of training images.
        rate: Highest learning rate.

    Returns:
        ``accuracy`` on the other images; ``learned_at``, the first step by which the accuracy of
        ten batches reached 95%, or None; ``entropy``, the mean entropy of the attention relative to
        a uniform map at each hundredth step, if the block has a softmax; and ``seconds``.
    """
    start = time.perf_counter()
    before = None
    if task in PRETRAINING:
        before = _pretrained(PRETRAINING[task], images, steps // 2, rate)
    torch.manual_seed(seed)
    block = None if settings is None else build_block(WIDTH, **settings)
    network = SmallNetwork(len(TASKS[task].categories), block)
    if before is not None:
        network.features.load_state_dict(before.features.state_dict())
    learned_at, entropy = _fit(network, make_examples(task, "train", images), steps, rate)
    return {
        "accuracy": round(_evaluate(network, make_examples(task, "val", 300)), 4),
        "learned_at": learned_at,
        "entropy": entropy,
        "seconds": round(time.perf_counter() - start, 1),
    }


@cache
def _pretrained(task: str, images: int, steps: int, rate: float) -> SmallNetwork:
    """A network without a block that has learned a task."""
    torch.manual_seed(0)
    network = SmallNetwork(len(TASKS[task].categories), None)
    _fit(network, make_examples(task, "train", images), steps, rate)
    return network


def _fit(
    network: SmallNetwork, examples: Examples, steps: int, rate: float
) -> tuple[Optional[int], dict[str, float]]:
    """Train a network; return when it had learned, and the entropy at each hundredth step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    recent: list[float] = []
    learned_at, entropy = None, {}
    for step in range(steps):
        batch = examples.batch(torch.randint(len(examples.images), (BATCH,)).unique())
        if step % 100 == 0:
            value = _entropy(network, batch.images)
            if value is not None:
                entropy[str(step)] = round(value, 4)
        logits = network(batch.images, batch.cells)
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.classes).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        recent = [*recent[-9:], _accuracy(logits, batch)]
        if learned_at is None and len(recent) == 10 and sum(recent) / 10 >= LEARNED:
            learned_at = step + 1
    return learned_at, entropy


@torch.no_grad()
def _evaluate(network: SmallNetwork, examples: Examples) -> float:
    network.eval()
    batch = examples.batch(torch.arange(len(examples.images)))
    return _accuracy(network(batch.images, batch.cells), batch)


def _accuracy(logits: Tensor, batch: Examples) -> float:
    """Share of the shapes that are classified rightly."""
    right = logits.argmax(dim=1) == batch.classes
    return right[batch.is_shape].float().mean().item()


@torch.no_grad()
def _entropy(network: SmallNetwork, images: Tensor) -> Optional[float]:
    """Mean relative entropy of the first image's attention maps; None without a softmax."""
    block = network.block
    if not isinstance(block, NonLocalBlock) or "gaussian" not in block.pairwise:
        return None
    features = network.features(images)[:1]  # with the statistics of the batch, as in training
    weights = block.attention_weights(features, torch.arange(features[0, 0].numel()))
    return relative_entropy(weights[0].flatten(1).numpy())
