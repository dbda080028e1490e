"""One measurement of a non-local sum or block; for ``tools/benchmark.py``.

Letters of shapes: B batch, C channels, D inner channels, N positions.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from nonlocal_det.layers import NonLocalBlock
from nonlocal_det.layers.pairwise import (
    concatenation_attention,
    concatenation_weights,
    dot_product_attention,
    dot_product_weights,
    softmax_attention,
    softmax_weights,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One measurement."""

    what: str
    pairwise: str
    shape: tuple[int, ...]  # (C, *S)
    mode: str
    dtype: str
    device: str
    batch: int
    threads: int
    form: str = "fast"

    @property
    def positions(self) -> int:
        """N."""
        return int(torch.Size(self.shape[1:]).numel())

    @property
    def inner(self) -> int:
        """D, the width of values; the Gaussian form compares all C channels."""
        return max(self.shape[0] // 2, 1)

    @property
    def width(self) -> int:
        """Of queries and keys."""
        return self.shape[0] if self.pairwise == "gaussian" else self.inner

    @property
    def name(self) -> str:
        """What a table calls it."""
        size = "x".join(map(str, self.shape))
        return f"{self.pairwise} {self.what}, {size}, {self.dtype}, {self.mode}"


# What can be measured: each makes a function and its inputs.


def make_sums(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The sums over the positions alone."""
    size, options = (case.batch, case.width, case.positions), make_options(case)
    if case.pairwise == "concatenation":
        size = (case.batch, case.positions)
    theta, phi = torch.randn(size, **options), torch.randn(size, **options)
    g = torch.randn(case.batch, case.inner, case.positions, **options)
    return sums(case), [theta, phi, g]


def sums(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The fast function, or the dense one, of theta, phi and g."""
    attention, weights, extra = softmax_attention, softmax_weights, (case.width**-0.5,)
    if case.pairwise == "dot_product":
        attention, weights, extra = dot_product_attention, dot_product_weights, ()
    if case.pairwise == "concatenation":
        attention, weights, extra = concatenation_attention, concatenation_weights, ()
    if case.form == "fast":
        return lambda theta, phi, g: attention(theta, phi, g, None, *extra)
    return lambda theta, phi, g: g @ weights(theta, phi, None, *extra).mT.to(g.dtype)


class DenseBlock(NonLocalBlock):
    """The block with its weights written out."""

    def _attend(self, theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]) -> Tensor:
        return g @ self._weights(theta, phi, mask).mT.to(g.dtype)


def make_block(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A whole NonLocalBlock."""
    block_type = NonLocalBlock if case.form == "fast" else DenseBlock
    block = block_type(
        case.shape[0], dims=len(case.shape) - 1, pairwise=case.pairwise, scale=True
    ).to(case.device, DTYPES[case.dtype])
    return block.train(case.mode == "training"), make_feature_map(case)


def make_convolutions(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The 1x1 convolutions of a block and no more."""
    block, inputs = make_block(replace(case, form="fast"))
    inner = [conv for name, conv in block.named_children() if name in ("theta", "phi", "g")]
    return lambda x: block.out(sum(conv(x) for conv in inner)), inputs


def make_feature_map(case: Case) -> list[Tensor]:
    """The input of a block."""
    return [torch.randn(case.batch, *case.shape, **make_options(case))]


def make_options(case: Case) -> dict[str, object]:
    """How tensors of this case are made."""
    return {
        "dtype": DTYPES[case.dtype],
        "device": case.device,
        "requires_grad": case.mode == "training",
    }


MAKERS = {"sums": make_sums, "block": make_block}


# What a case needs.


def products_in(case: Case) -> float:
    """Operations of the matrix products that a case cannot do without."""
    n, width, inner = case.positions, case.width, case.inner
    operations = 2 * n * n * (width + inner)
    if case.pairwise == "dot_product":
        operations = min(operations, 4 * n * width * inner)
    if case.pairwise == "concatenation":
        operations = 0
    if case.what == "block":
        convolutions = 2 if case.pairwise == "gaussian" else 4
        operations += convolutions * 2 * n * case.shape[0] * inner
    return case.batch * operations * (3 if case.mode == "training" else 1)


def fits(case: Case) -> bool:
    """Whether memory holds the three or, with their gradients, four copies of dense weights."""
    copies = 4 if case.mode == "training" else 3
    needed = copies * case.batch * case.positions**2 * DTYPES[case.dtype].itemsize
    return needed < available_memory(case.device)


def available_memory(device: str) -> float:
    """Bytes that are free."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(float(s.split()[1]) * 1024 for s in file if s.startswith("MemAvailable"))


# A measurement, in a process of its own.


def in_new_process(case: Case) -> dict[str, float]:
    """Measure where nothing ran before; a server that has loaded the code forks each process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nonlocal_det.layers"])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, case).result()
    except BrokenProcessPool:
        raise SystemExit(
            f"The process for {case.name} ({case.form}) died: out of memory?"
        ) from None


def measure(case: Case) -> dict[str, float]:
    """Seconds a call, peak bytes, and operations a second of the best matrix product."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    maker = make_convolutions if case.form == "convolutions" else MAKERS[case.what]
    call(*maker(replace(case, shape=(case.shape[0], *(2 for _ in case.shape[1:])))))  # loads code
    function, inputs = maker(case)
    peak = peak_memory(case.device, lambda: call(function, inputs))
    seconds = timed(case.device, lambda: call(function, inputs))
    return {"seconds": seconds, "bytes": peak, "rate": matmul_rate(case)}


def call(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Once forward and, where gradients are asked for, backward."""
    if inputs[0].requires_grad:
        y = function(*inputs)
        y.backward(torch.ones_like(y))
        for x in inputs:
            x.grad = None
    else:
        with torch.inference_mode():
            function(*inputs)


def timed(device: str, run: Callable[[], object], budget: float = 2.0) -> float:
    """Median seconds of 3 to 50 calls, about ``budget`` seconds of them; a stall counts once."""
    seconds: list[float] = []
    while len(seconds) < 3 or (
        len(seconds) < 50 and len(seconds) * statistics.median(seconds) < budget
    ):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_rate(case: Case) -> float:
    """Operations a second of the fastest product as wide as the case's and of a GPU's liking."""
    n, options = 2048, {"dtype": DTYPES[case.dtype], "device": case.device}
    rates = []
    for width in (case.inner, n):
        a, b = torch.randn(n, width, **options), torch.randn(width, n, **options)
        out = torch.empty(n, n, **options)
        torch.mm(a, b, out=out)
        seconds = timed(case.device, lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 0.3)
        rates.append(2 * n * n * width / seconds)
    return max(rates)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str, run: Callable[[], object]) -> float:
    """Bytes that a first call holds at most, beyond what is held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak begins anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field))
    return float(line.split()[1]) * 1024
