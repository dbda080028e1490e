"""The parts of the report in their order of worth: what each measures on a GPU, and in miniature.

On a CPU the report checks itself: all parts at small sizes, but no training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from ...layers import PAIRWISE
from ...layers.non_local import SOFTMAX
from ..cases import DTYPES, Case
from ..detector import measure_detector
from .exactness import Check, check_block, check_large_activations
from .kernels import Call, measure_kernels
from .tables import measure_table_row
from .training import train_far_task

Row = dict[str, Any]
_MODES = ("inference", "training")
_HALVES = ("float16", "bfloat16")
_TRAINING_SECONDS = 90.0  # a first estimate of what both trainings take


@dataclass(frozen=True)
class Task:
    """One row of a part.

    Attributes:
        name: Name of the row.
        run: Measures it.
        seconds: Time that must be left for it to start.
    """

    name: str
    run: Callable[[], Row]
    seconds: float = 0.0


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        name: Its key in the JSON.
        title: Its heading.
        share: Its share of the time; what it leaves is the next ones'.
        tasks: Function of a device, and of the value of ``time.monotonic()`` at its end.
        checks: Whether an error in it is a failure.
    """

    name: str
    title: str
    share: float
    tasks: Callable[[str, float], list[Task]]
    checks: bool = False


def _dtypes(device: str) -> list[str]:
    return [dtype for dtype in DTYPES if device == "cuda" or dtype != "tf32"]


def _kernels(device: str, deadline: float) -> list[Task]:
    # The Gaussian compares all channels, and sums half as many. An awkward number of keys.
    widths = [(width, width) for width in (64, 128, 256, 512)] + [(1024, 512)]
    positions, masks = 8398, (False, True)
    if device == "cpu":
        widths, positions, masks = [(16, 16)], 512, (False,)
    calls = [
        Call(*width, positions, dtype, mode, device, masked)
        for masked, mode, width, dtype in product(
            masks, _MODES, widths, ("float32", "float16", "bfloat16")
        )
    ]
    return [Task(call.name, partial(measure_kernels, call)) for call in calls]


def _tables(device: str, deadline: float) -> list[Task]:
    shapes, targets = [(1024, 50, 84), (512, 100, 168)], ("aggregation", "block")
    if device == "cpu":
        shapes, targets = [(16, 9, 11)], ("block",)
    threads = torch.get_num_threads()
    # What is used most comes first.
    ordered = sorted(PAIRWISE, key=lambda name: name != "embedded_gaussian")
    cases = [
        Case(target, name, shape, mode, dtype, device, 1, threads, subsample=subsample)
        for name, subsample, shape, target, mode, dtype in product(
            ordered, (False, True), shapes, targets, _MODES, _dtypes(device)
        )
    ]
    return [Task(case.name, partial(measure_table_row, case), seconds=5) for case in cases]


def _exactness(device: str, deadline: float) -> list[Task]:
    """Odd sizes, widths that no fused kernel takes, and more keys than channels or fewer."""
    inputs: list[dict[str, Any]] = [
        {"shape": (6, 1, 3)},
        {"shape": (10, 7, 9), "masked": True},
        {"shape": (10, 7, 9), "masked": True, "subsample": True},
    ]
    if device == "cuda":
        inputs += [
            {"shape": (64, 13, 21), "subsample": True},
            {"shape": (64, 13, 21)},
            {"shape": (130, 25, 42), "masked": True},
        ]
    checks = [
        Check(pairwise, dtype, device=device, **given)
        for given, pairwise, dtype in product(inputs, PAIRWISE, _dtypes(device))
        # Among so many sums, some are so near the ReLU's kink that roundings decide its side.
        if not (pairwise == "concatenation" and given["shape"][0] == 130)
    ]
    return [Task(check.name, partial(check_block, check)) for check in checks]


def _detectors(device: str, deadline: float) -> list[Task]:
    config, size, repeats = "mask_rcnn_R50_NL", (800, 1333), 5
    if device == "cpu":
        config, size, repeats = "lamps_mask_rcnn_R18_NL", (64, 96), 1
    names = {False: "float32", True: "mixed precision"}
    run = partial(_detector, config, size, repeats, device)
    return [Task(name, partial(run, mixed), seconds=15) for mixed, name in names.items()]


def _detector(config: str, size: tuple[int, int], repeats: int, device: str, mixed: bool) -> Row:
    modes = list(measure_detector(config, size, repeats, device, mixed))
    return {"config": config, "size": list(size), "modes": modes}


def _activations(device: str, deadline: float) -> list[Task]:
    shape = (256, 25, 42) if device == "cuda" else (10, 7, 9)
    checks = [
        Check(pairwise, dtype, shape, device, magnitude=1e3, damped=damped)
        for damped, pairwise, dtype in product((False, True), PAIRWISE, _HALVES)
        # Cosines do not depend on the magnitude.
        if not (damped and pairwise in SOFTMAX)
    ]
    return [Task(check.name, partial(check_large_activations, check)) for check in checks]


def _training(device: str, deadline: float) -> list[Task]:
    if device == "cpu":
        return [Task("far", lambda: {"skipped": "it takes minutes on a CPU"})]
    return [Task("far", partial(train_far_task, device, deadline), seconds=_TRAINING_SECONDS)]


PARTS = (
    Part("kernels", "Attention kernels", 0.15, _kernels),
    Part("tables", "Time and memory", 0.25, _tables),
    Part("exactness", "Exactness", 0.1, _exactness, checks=True),
    Part("detectors", "Whole detector", 0.1, _detectors),
    Part("activations", "Mixed precision with large activations", 0.05, _activations, checks=True),
    Part("training", "Training on a far cue", 0.3, _training),
)
