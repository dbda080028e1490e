"""Benchmark cases: an aggregation or a block, its inputs, and what it needs at least.

Shape symbols: B batch, C channels, D inner channels, V value channels, N query and M key positions,
S spatial sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import NonLocalBlock
from ..layers.non_local import SOFTMAX
from ..layers.pairwise import (
    concatenation_attention,
    concatenation_weights,
    dot_product_attention,
    dot_product_weights,
    softmax_attention,
    softmax_weights,
)
from .peers import GLOBAL_CONTEXT, PEERS, Setting

# "tf32" is float32 whose products may be rounded to TF32 on a GPU; on a CPU it is float32.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Allow TF32 in products and convolutions for the dtype "tf32", and forbid it for others."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = dtype == "tf32"
        yield
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed


@dataclass(frozen=True)
class Case:
    """One configuration to measure.

    Attributes:
        target: Kind of function, "aggregation" or "block".
        pairwise: Pairwise function, one of `nonlocal_det.layers.PAIRWISE`, or with a peer
            `GLOBAL_CONTEXT`.
        shape: Channels and spatial sizes of the block's input, (C, *S).
        mode: "inference" for the forward pass, "training" for forward and backward.
        dtype: Name of the tensors' dtype, one of `DTYPES`.
        device: "cpu" or "cuda".
        batch_size: Number of images, B.
        threads: Number of CPU threads.
        form: Implementation: "fast" is the package's, "dense" holds the N x M attention weights,
            "sdpa" calls PyTorch's scaled dot-product attention, for a softmax, "convolutions" has a
            block's 1x1 convolutions only, and "peer" is that of ``peer``.
        peer: Name in `PEERS` of the block of another package whose settings and weights a block
            has, or "".
        subsample: Whether keys and values are max-pooled by 2.
    """

    target: str
    pairwise: str
    shape: tuple[int, ...]
    mode: str
    dtype: str
    device: str
    batch_size: int
    threads: int
    form: str = "fast"
    peer: str = ""
    subsample: bool = False

    @property
    def positions(self) -> int:
        """Number of positions, N."""
        return int(torch.Size(self.shape[1:]).numel())

    @property
    def keys(self) -> int:
        """Number of key positions, M."""
        stride = 2 if self.subsample else 1
        return int(torch.Size(-(-size // stride) for size in self.shape[1:]).numel())

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key, N M; N if all queries share their weights."""
        return self.positions * (1 if self.pairwise == GLOBAL_CONTEXT else self.keys)

    @property
    def inner_channels(self) -> int:
        """Channels of the values, D, or of the bottleneck of a global context block."""
        return max(self.shape[0] // (16 if self.pairwise == GLOBAL_CONTEXT else 2), 1)

    @property
    def key_channels(self) -> int:
        """Channels of queries and keys: the Gaussian form compares all C of the input."""
        return self.shape[0] if self.pairwise == "gaussian" else self.inner_channels

    @property
    def name(self) -> str:
        """Label of the case in tables."""
        size = "x".join(map(str, self.shape)) + (" subsampled" if self.subsample else "")
        return f"{self.pairwise} {self.target}, {size}, {self.dtype}, {self.mode}"


Measured = tuple[Callable[..., Tensor], list[Tensor]]


def make_function(case: Case) -> Measured:
    """Build the function of a case and its random inputs."""
    if case.peer:
        return _make_pair(case)
    if case.form == "convolutions":
        return _make_convolutions(case)
    return _make_block(case) if case.target == "block" else _make_aggregation(case)


def _make_aggregation(case: Case) -> Measured:
    """The weighted sums over all keys alone, with their queries, keys and values."""
    width = () if case.pairwise == "concatenation" else (case.key_channels,)
    options = _tensor_options(case)
    theta = torch.randn(case.batch_size, *width, case.positions, **options)
    phi = torch.randn(case.batch_size, *width, case.keys, **options)
    g = torch.randn(case.batch_size, case.inner_channels, case.keys, **options)
    return _aggregation(case), [theta, phi, g]


def _aggregation(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of theta, phi and g in the case's form."""
    attention, weights, extra = softmax_attention, softmax_weights, (case.key_channels**-0.5,)
    if case.pairwise == "dot_product":
        attention, weights, extra = dot_product_attention, dot_product_weights, ()
    if case.pairwise == "concatenation":
        attention, weights, extra = concatenation_attention, concatenation_weights, ()
    if case.form == "sdpa":
        return lambda theta, phi, g: torch_attention(theta, phi, g, *extra)
    if case.form == "fast":
        return lambda theta, phi, g: attention(theta, phi, g, None, *extra)
    return lambda theta, phi, g: g @ weights(theta, phi, None, *extra).mT.to(g.dtype)


def torch_attention(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """PyTorch's scaled dot-product attention, with rows that its fused kernels take; (B, V, N).

    Args:
        theta: Queries, (B, D, N).
        phi: Keys, (B, D, M).
        g: Values, (B, V, M).
        scale: Factor of the logits.
    """
    query, key, value = (x.mT.unsqueeze(1).contiguous() for x in (theta, phi, g))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1).mT


class DenseBlock(NonLocalBlock):
    """A block that holds its N x M attention weights."""

    def _attend(self, theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]) -> Tensor:
        return g @ self._weights(theta, phi, mask).mT.to(g.dtype)


class TorchAttentionBlock(NonLocalBlock):
    """A block with a softmax that calls `torch_attention`; it has no masks."""

    def _attend(self, theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]) -> Tensor:
        return torch_attention(*self._compared(theta, phi), g, self.scale)


_BLOCKS = {"fast": NonLocalBlock, "dense": DenseBlock, "sdpa": TorchAttentionBlock}


def _make_block(case: Case) -> Measured:
    scale = True if case.pairwise in SOFTMAX else None  # as in other implementations
    options = {"dims": len(case.shape) - 1, "pairwise": case.pairwise, "scale": scale}
    block = _BLOCKS[case.form](case.shape[0], subsample=case.subsample, **options)
    block = block.to(case.device, DTYPES[case.dtype])
    x = torch.randn(case.batch_size, *case.shape, **_tensor_options(case))
    return block.train(case.mode == "training"), [x]


def _make_pair(case: Case) -> Measured:
    """Our block, or the peer's, with the weights and the input that both get."""
    channels = case.shape[0]
    setting = Setting(channels, case.inner_channels, case.pairwise, case.subsample)
    ours, theirs = PEERS[case.peer].make_pair(setting)
    block = (ours if case.form == "fast" else theirs).to(case.device, DTYPES[case.dtype])
    x = torch.randn(case.batch_size, *case.shape, **_tensor_options(case))
    if case.pairwise == "gaussian":
        with torch.no_grad():
            x.mul_(channels**-0.25)  # peers do not scale its logits, the products of x with itself
    return block.train(case.mode == "training"), [x]


def _make_convolutions(case: Case) -> Measured:
    block, inputs = _make_block(replace(case, form="fast"))
    inner = [conv for name, conv in block.named_children() if name in ("theta", "phi", "g")]
    return lambda x: block.out(sum(conv(x) for conv in inner)), inputs


def _tensor_options(case: Case) -> dict[str, object]:
    return {
        "dtype": DTYPES[case.dtype],
        "device": case.device,
        "requires_grad": case.mode == "training",
    }


def minimum_operations(case: Case) -> float:
    """Number of multiplications and additions in the matrix products that a case needs."""
    n, m, width, inner = case.positions, case.keys, case.key_channels, case.inner_channels
    operations = 2 * n * m * (width + inner)
    if case.pairwise == "dot_product":
        operations = min(operations, 2 * (n + m) * width * inner)
    if case.pairwise == "concatenation":
        operations = 0
    if case.target == "block":
        convolutions = 2 if case.pairwise == "gaussian" else 4
        operations += convolutions * 2 * n * case.shape[0] * inner
    return case.batch_size * operations * (3 if case.mode == "training" else 1)


def fits_in_memory(case: Case) -> bool:
    """Whether free memory holds the dense form: 3 copies of its weights, or 4 with gradients.

    Peers hold the 2 D features of each pair that the concatenation compares.
    """
    copies = 4 if case.mode == "training" else 3
    if case.peer and case.pairwise == "concatenation":
        copies *= 2 * case.inner_channels
    needed = copies * case.batch_size * case.pairs * DTYPES[case.dtype].itemsize
    return needed < _available_memory(case.device)


def _available_memory(device: str) -> float:
    """Free memory in bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(float(s.split()[1]) * 1024 for s in file if s.startswith("MemAvailable"))
