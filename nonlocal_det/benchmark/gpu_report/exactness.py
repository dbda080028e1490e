"""Is a block right on this device? Its results against a dense one in float64, on the CPU.

A result may be off by `MOVES` times as far as it moves, in float64, if every input and parameter
moves by one eps of the dtype: a rounding is a move of at most half an eps, and a block rounds about
sixteen times on the way to its gradients. So the tolerance knows how sensitive a result is. TF32
has the eps of float16.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from ...layers import NonLocalBlock
from ...layers.non_local import SOFTMAX
from ..cases import DTYPES, DenseBlock, precision

MOVES = 8
_DIRECTIONS = 3  # random ones, of which the largest effect counts

_GRADIENT = "gradient of "

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """A block and its input.

    Attributes:
        pairwise: Pairwise function, one of `nonlocal_det.layers.PAIRWISE`.
        dtype: Name of the dtype, one of `DTYPES`.
        shape: Channels, height and width of the input.
        device: "cpu" or "cuda".
        subsample: Whether keys and values are max-pooled by 2.
        masked: Whether the second of the two images has padding.
        magnitude: Standard deviation of the input.
        damped: Whether queries and keys are divided by that.
    """

    pairwise: str
    dtype: str
    shape: tuple[int, int, int]
    device: str
    subsample: bool = False
    masked: bool = False
    magnitude: float = 1.0
    damped: bool = False

    @property
    def name(self) -> str:
        """Label in tables."""
        words = ["x".join(map(str, self.shape))]
        words += [word for word in ("subsample", "masked", "damped") if getattr(self, word)]
        return f"{self.pairwise}, {self.dtype}, {' '.join(words)}"

    @property
    def eps(self) -> float:
        """Rounding unit of the dtype."""
        return torch.finfo(torch.float16 if self.dtype == "tf32" else DTYPES[self.dtype]).eps


def check_block(check: Check) -> dict[str, Any]:
    """Compare output and gradients of a block with the dense one's in float64.

    Returns:
        ``difference``: the relative error that is largest beside its ``tolerance``, or None if it
        is not finite; ``tensor``: whose it is; ``passed``.
    """
    block, x, mask = _make(check)
    block, x = block.to(DTYPES[check.dtype]), x.to(DTYPES[check.dtype])
    expected, moved = _expected_and_moved(_dense(block), x.double(), mask, check.eps)
    block, x = block.to(check.device), x.to(check.device)
    with precision(check.dtype):
        found = _results(block, x, None if mask is None else mask.to(check.device))
    return _worst(found, expected, moved)


def check_large_activations(check: Check) -> dict[str, Any]:
    """Compare a block under autocast with itself in float32, on activations of 1000.

    Returns:
        As `check_block`, of the output; ``finite``: whether all of it is, also in float32;
        ``compared``: whether it can be compared, which is not so if values in float32 exceed the
        range of the dtype.
    """
    block, x, _ = _make(check)
    _, moved = _expected_and_moved(_dense(block), x.double(), None, check.eps)
    block, x = block.to(check.device), x.to(check.device)
    with torch.no_grad(), precision("float32"):
        in_float32, inner = block(x), block.aggregate(x)
        with torch.autocast(check.device, DTYPES[check.dtype]):
            found = block(x)
    largest = max(values.abs().max().item() for values in (in_float32, inner))
    compared = largest < torch.finfo(DTYPES[check.dtype]).max
    finite = bool(found.isfinite().all() and in_float32.isfinite().all())
    row = _worst({"output": found}, {"output": in_float32.cpu().double()}, moved)
    passed = finite and (row["passed"] or not compared)
    return {**row, "finite": finite, "compared": compared, "passed": passed}


def _make(check: Check) -> tuple[NonLocalBlock, Tensor, Optional[Tensor]]:
    """A block whose branch counts, two images, and their mask or None, in float32 on the CPU."""
    torch.manual_seed(0)
    channels, height, width = check.shape
    # Pooled first: of rounded embeddings, another position could be the largest.
    options = {"subsample": check.subsample, "pool_first": True, "norm": ""}
    if check.pairwise in SOFTMAX:
        # Not the default 10: positions would attend to themselves alone, which has no gradient.
        options["logit_scale"] = 2.0
    block = NonLocalBlock(channels, pairwise=check.pairwise, **options)
    torch.nn.init.normal_(block.out.weight, std=channels**-0.5)
    if check.damped:
        for embedding in (block.theta, block.phi):
            torch.nn.init.normal_(embedding.weight, std=channels**-0.5 / check.magnitude)
    x = torch.randn(2, *check.shape) * check.magnitude
    mask = None
    if check.masked:
        mask = torch.ones(2, height, width, dtype=torch.bool)
        mask[1, height * 2 // 3 :] = False
        mask[1, :, width // 2 :] = False
    return block, x, mask


def _dense(block: NonLocalBlock) -> DenseBlock:
    """The dense form in float64, with the same weights."""
    dense = copy.deepcopy(block).double()
    dense.__class__ = DenseBlock
    return dense


def _results(block: NonLocalBlock, x: Tensor, mask: Optional[Tensor]) -> Results:
    """Output and gradients, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    towards = torch.randn(x.shape, generator=generator).to(x)
    block.zero_grad()
    x = x.detach().requires_grad_()
    y = block(x, mask)
    y.backward(towards)
    results = {"output": y.detach(), f"{_GRADIENT}input": x.grad}
    results.update({_GRADIENT + name: p.grad for name, p in block.named_parameters()})
    return {name: result.cpu().double() for name, result in results.items()}


def _expected_and_moved(
    block: NonLocalBlock, x: Tensor, mask: Optional[Tensor], eps: float
) -> tuple[Results, dict[str, float]]:
    """Results in float64, and how far each moves with moves of eps.

    To that adds an eps of the result itself, or of the largest of the gradients: that of some
    biases is zero but for rounding.
    """
    expected = _results(block, x, mask)
    gradients = [expected[name] for name in expected if name.startswith(_GRADIENT)]
    largest = max(gradient.abs().max().item() for gradient in gradients)
    moved = {}
    generator = torch.Generator().manual_seed(2)
    others = [_moved(block, x, mask, eps, generator) for _ in range(_DIRECTIONS)]
    for name, result in expected.items():
        size = largest if name.startswith(_GRADIENT) else result.abs().max().item()
        distances = [(other[name] - result).abs().max().item() for other in others]
        moved[name] = max(distances) + eps * size
    return expected, moved


def _moved(
    block: NonLocalBlock,
    x: Tensor,
    mask: Optional[Tensor],
    eps: float,
    generator: torch.Generator,
) -> Results:
    """Results if each number of the input and of the parameters is eps larger or smaller."""
    block, x = copy.deepcopy(block), x.clone()
    with torch.no_grad():
        for values in (*block.parameters(), x):
            up = torch.rand(values.shape, generator=generator) < 0.5
            values.mul_(torch.where(up, 1 + eps, 1 - eps))
    return _results(block, x, mask)


def _worst(found: Results, expected: Results, moved: Mapping[str, float]) -> dict[str, Any]:
    """The result that is worst beside its tolerance; both are relative to its largest number."""
    rows = []
    for name, truth in expected.items():
        error = (found[name].cpu().double() - truth).abs().max().item()
        tolerance = MOVES * moved[name]
        size = truth.abs().max().item() or 1.0
        ratio = error / tolerance if math.isfinite(error) else math.inf
        rows.append((ratio, name, error / size, tolerance / size))
    ratio, name, error, tolerance = max(rows)
    return {
        "tensor": name,
        "difference": error if math.isfinite(error) else None,
        "tolerance": tolerance,
        "passed": ratio <= 1,
    }
