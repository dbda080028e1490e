"""The time that a configuration's blocks add to its whole model; for ``tools/benchmark.py``.

The stock model and the one with blocks have the same weights, and new blocks are the identity: both
see the same proposals and find the same objects. They take turns, in one process; ratios are taken
turn by turn. A training step is forward, backward and a step of SGD that moves nothing.
"""

from __future__ import annotations

import statistics
import time

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from nonlocal_det.config import load_config

Inputs = list[dict[str, object]]


def compare(config_file: str, size: tuple[int, int], rounds: int, device: str) -> None:
    """Print the medians and the ratio, for one picture of ``size`` (height, width) in pixels."""
    models = build_both(config_file, device)
    inputs = random_input(size, len_classes=models["stock"].roi_heads.num_classes)
    for mode, run in (("inference", infer), ("training", train)):
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(rounds + 1):
            for name in sorted(models, reverse=bool(turn % 2)):
                start = time.perf_counter()
                run(models[name], inputs)
                seconds[name].append(time.perf_counter() - start)
        stock, blocks = (seconds[name][1:] for name in ("stock", "blocks"))  # the first warms up
        ratios = [b / s for b, s in zip(blocks, stock)]
        print(
            f"{mode:10} stock {statistics.median(stock):7.3f} s   "
            f"with blocks {statistics.median(blocks):7.3f} s   "
            f"ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


def build_both(config_file: str, device: str) -> dict[str, nn.Module]:
    """The configuration's model, and the same without its blocks."""
    models = {}
    for name, options in (("blocks", []), ("stock", ["MODEL.NONLOCAL.POSITIONS", "()"])):
        cfg = load_config(config_file, ["MODEL.DEVICE", device, *options])
        torch.manual_seed(0)
        models[name] = build_model(cfg)
    models["blocks"].load_state_dict(models["stock"].state_dict(), strict=False)
    return models


def random_input(size: tuple[int, int], len_classes: int, count: int = 8) -> Inputs:
    """Noise with ``count`` annotated squares."""
    generator = torch.Generator().manual_seed(0)
    side = min(size) // 4
    corners = torch.rand(count, 2, generator=generator)
    corners = corners * torch.tensor([size[1] - side, size[0] - side])
    boxes = torch.cat([corners, corners + side], dim=1)
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    classes = torch.randint(len_classes, (count,), generator=generator)
    truth = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes, gt_masks=BitMasks(masks))
    image = torch.randint(256, (3, *size), generator=generator).float()
    return [{"image": image, "instances": truth, "height": size[0], "width": size[1]}]


def infer(model: nn.Module, inputs: Inputs) -> None:
    """Detect, to the end."""
    with torch.no_grad():
        _finish(model.eval()(inputs))


def train(model: nn.Module, inputs: Inputs) -> None:
    """One step that moves nothing."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.0, momentum=0.9)
    loss = sum(losses(model, inputs).values())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    _finish(loss)


def losses(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Of a training step; which anchors and boxes it samples is the same each time."""
    torch.manual_seed(0)
    with EventStorage():
        return model.train()(inputs)


def _finish(_: object) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
