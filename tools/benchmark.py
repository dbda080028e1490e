#!/usr/bin/env python
"""Measure what non-local sums and blocks cost: fast against dense, in time and in peak memory.

    python tools/benchmark.py
    python tools/benchmark.py --pairwise dot_product --shape 256x200x336 --what block
    python tools/benchmark.py --config-file configs/mask_rcnn_R50_NL.yaml

"fast" is what the package does; "dense" writes the weights out, multiplies, and leaves the
backward to autograd, as is usual. Each measurement is a process of its own. Fast and dense take
turns, and medians are over the turns. Logits have a standard deviation near 1, which is kind to the
dense form: unscaled, many weights are denormal numbers, with which a CPU is up to 70 times slower.

Peak memory is what a call adds to its inputs: on a CPU the resident set, on a GPU what PyTorch's
allocator holds. The floor is the time that the products in it would take at the best rate of matrix
products measured beside it; "convolutions" is the time of a block's own 1x1 convolutions.

Letters of shapes: B batch, C channels, D inner channels, N positions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Optional

import torch
import whole_model
from torch import Tensor

from nonlocal_det.engine import one_sentence_errors
from nonlocal_det.files import check_folder
from nonlocal_det.layers import PAIRWISE, NonLocalBlock
from nonlocal_det.layers.pairwise import (
    concatenation_attention,
    concatenation_weights,
    dot_product_attention,
    dot_product_weights,
    softmax_attention,
    softmax_weights,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ((512, 100, 168), (1024, 50, 84))
MIB = 2**20


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


# A measurement, in a process of its own.


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


# The comparison.


def compare(case: Case, rounds: int, fast_only: bool) -> dict[str, object]:
    """Measure the forms of a case in turn; medians, and their ratios."""
    forms = ["fast"]
    if not fast_only and fits(case):
        forms.append("dense")
    if case.what == "block":
        forms.append("convolutions")
    results: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    for _, form in product(range(rounds), forms):
        results[form].append(in_new_process(replace(case, form=form)))
    row: dict[str, object] = {"case": asdict(case), "name": case.name}
    for form, runs in results.items():
        for key in ("seconds", "bytes"):
            row[f"{form}_{key}"] = statistics.median(run[key] for run in runs)
    row["matmul_rate"] = max(run["rate"] for runs in results.values() for run in runs)
    row["floor_seconds"] = products_in(case) / row["matmul_rate"]
    return row


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


# What is printed and written.

COLUMNS = "time ms", "dense", "ratio", "peak MiB", "dense", "ratio", "x floor", "x convs"


def table(rows: Iterable[dict[str, object]]) -> str:
    """A line a case; a dash for what was not measured or has no meaning."""
    rows = list(rows)
    width = max(len(str(row["name"])) for row in rows)
    head = " " * width + "".join(f"{column:>10}" for column in COLUMNS)
    return "\n".join([head, *(table_line(row, width) for row in rows)])


def table_line(row: dict[str, object], width: int) -> str:
    """One line of the table."""
    seconds, peak = row["fast_seconds"], row["fast_bytes"]
    dense_seconds, dense_peak = row.get("dense_seconds"), row.get("dense_bytes")
    cells = (
        cell(seconds, 1e-3, 1),
        cell(dense_seconds, 1e-3, 1),
        cell(seconds, dense_seconds, 3),
        cell(peak, MIB, 0),
        cell(dense_peak, MIB, 0),
        cell(peak, dense_peak, 3),
        cell(seconds, row["floor_seconds"], 2),
        cell(seconds, row.get("convolutions_seconds"), 2),
    )
    return f"{row['name']:<{width}}" + "".join(cells)


def cell(value: Optional[float], unit: Optional[float], digits: int) -> str:
    """The value in that unit, or a dash."""
    return f"{value / unit:>10.{digits}f}" if value is not None and unit else f"{'-':>10}"


def machine(device: str, threads: int) -> dict[str, object]:
    """What it all ran on."""
    found = {"device": processor(), "threads": threads, "load": os.getloadavg()[0]}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    return {**found, "torch": torch.__version__, "python": platform.python_version()}


def processor() -> str:
    """The name of the CPU."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def plot(rows: list[dict[str, object]], path: str) -> None:
    """Time and peak memory against positions: fast drawn through, dense dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
    curves = sorted({curve(row) for row in rows})
    for axis, key, unit, label in zip(
        axes, ("seconds", "bytes"), (1e-3, MIB), ("time, ms", "peak memory, MiB")
    ):
        for (number, name), (form, style) in product(
            enumerate(curves), (("fast", "o-"), ("dense", "s--"))
        ):
            points = sorted(
                (positions(row), row[f"{form}_{key}"] / unit)
                for row in rows
                if curve(row) == name and f"{form}_{key}" in row
            )
            if points:
                axis.plot(*zip(*points), style, color=f"C{number}", label=f"{name}, {form}")
        axis.set(xscale="log", yscale="log", xlabel="positions", ylabel=label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


def curve(row: dict[str, object]) -> str:
    """The line of a plot that a row is a point of."""
    case = row["case"]
    channels = f"{case['shape'][0]} channels"
    return f"{case['pairwise']} {case['what']}, {channels}, {case['dtype']}, {case['mode']}"


def positions(row: dict[str, object]) -> int:
    """N of a row."""
    return torch.Size(row["case"]["shape"][1:]).numel()


# The command line.


def shape(text: str) -> tuple[int, ...]:
    """Read 512x100x168: channels, then one, two or three sizes."""
    sizes = text.split("x")
    if not 2 <= len(sizes) <= 4 or not all(s.isdigit() and int(s) > 0 for s in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape: give channels and one to three sizes, like 512x100x168."
        )
    return tuple(map(int, sizes))


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on.")
    return int(text)


def parse_arguments(arguments: Optional[list[str]] = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--what", nargs="+", choices=tuple(MAKERS), default=["sums"], help="what is measured")
    add("--pairwise", nargs="+", choices=PAIRWISE, default=list(PAIRWISE), help="functions")
    add("--shape", nargs="+", type=shape, default=SHAPES, metavar="CxHxW", help="block inputs")
    add("--mode", nargs="+", choices=("inference", "training"), default=["inference", "training"],
        help="forward alone, or forward and backward")  # fmt: skip
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32"], help="of all tensors")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    add("--batch", type=positive, default=1, help="images at once")
    add("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
    add("--rounds", type=positive, default=3, help="turns of fast and dense; medians are over them")
    add("--fast-only", action="store_true", help="leave the dense forms out")
    add("--output", help="folder for benchmark.json and benchmark.png; nothing is written without")
    add(
        "--config-file", help="instead: the time that its blocks add to this whole model, at --size"
    )
    add("--size", type=positive, nargs=2, default=(800, 1333), help="height and width of a picture")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here; use --device cpu.")
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    if options.output:
        with one_sentence_errors():
            check_folder(options.output)
    found = machine(options.device, options.threads)
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    if options.device == "cpu" and found["load"] > 0.5:
        print("Other programs are busy: times will be too long, of the fast forms above all.")
    if options.config_file:
        with one_sentence_errors():
            whole_model.compare(
                options.config_file, tuple(options.size), options.rounds, options.device
            )
        return
    cases = [
        Case(what, pairwise, size, mode, dtype, options.device, options.batch, options.threads)
        for dtype, what, size, pairwise, mode in product(
            options.dtype, options.what, options.shape, options.pairwise, options.mode
        )
    ]
    rows = []
    for number, case in enumerate(cases, start=1):
        print(f"{number} of {len(cases)}: {case.name}", flush=True)
        rows.append(compare(case, options.rounds, options.fast_only))
    print(table(rows))
    if options.output:
        write(options.output, found, rows)


def write(folder: str, found: dict[str, object], rows: list[dict[str, object]]) -> None:
    """The figures as JSON, and the plot."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "benchmark.json"), "w", encoding="utf-8") as file:
        json.dump({"machine": found, "rows": rows}, file, indent=2)
    plot(rows, os.path.join(folder, "benchmark.png"))
    print(f"Written: {folder}/benchmark.json and benchmark.png.")


if __name__ == "__main__":
    main()
