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
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import product
from typing import Optional

import benchmark_model
import torch
from benchmark_case import DTYPES, MAKERS, Case, fits, in_new_process, products_in

from nonlocal_det.errors import exit_on_error
from nonlocal_det.layers import PAIRWISE
from nonlocal_det.utils.file_io import ensure_writable_dir

SHAPES = ((512, 100, 168), (1024, 50, 84))
MIB = 2**20


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


def parse_args(arguments: Optional[list[str]] = None) -> argparse.Namespace:
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
    options = parse_args()
    if options.output:
        with exit_on_error():
            ensure_writable_dir(options.output)
    found = machine(options.device, options.threads)
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    if options.device == "cpu" and found["load"] > 0.5:
        print("Other programs are busy: times will be too long, of the fast forms above all.")
    if options.config_file:
        with exit_on_error():
            benchmark_model.compare(
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
