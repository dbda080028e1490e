"""Tables, plots and JSON of benchmark results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from itertools import product
from typing import Any, Optional

import torch
from matplotlib.figure import Figure

from ..utils.file_io import atomic_write
from ..utils.plotting import save_figure

FILES = ("benchmark.json", "benchmark.png")
MIB = 2**20
COLUMNS = "time ms", "dense", "ratio", "peak MiB", "dense", "ratio", "x floor", "x convs"

Row = dict[str, Any]


def machine_info(device: str, threads: int) -> dict[str, object]:
    """Processor or GPU, CPU threads, load of the machine, and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    return {
        "device": name,
        "threads": threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor_name() -> str:
    """Model name of the CPU where the system tells it, or else its architecture."""
    names = []
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def results_table(rows: Sequence[Row]) -> str:
    """One line per case; a dash for what was not measured or has no meaning."""
    width = max(len(row["name"]) for row in rows)
    head = " " * width + "".join(f"{column:>10}" for column in COLUMNS)
    return "\n".join([head, *(_table_line(row, width) for row in rows)])


def _table_line(row: Row, width: int) -> str:
    seconds, peak = row["fast_seconds"], row["fast_bytes"]
    dense_seconds, dense_peak = row.get("dense_seconds"), row.get("dense_bytes")
    cells = (
        _cell(seconds, 1e-3, 1),
        _cell(dense_seconds, 1e-3, 1),
        _cell(seconds, dense_seconds, 3),
        _cell(peak, MIB, 0),
        _cell(dense_peak, MIB, 0),
        _cell(peak, dense_peak, 3),
        _cell(seconds, row["floor_seconds"], 2),
        _cell(seconds, row.get("convolutions_seconds"), 2),
    )
    return f"{row['name']:<{width}}" + "".join(cells)


def _cell(value: Optional[float], unit: Optional[float], digits: int) -> str:
    return f"{value / unit:>10.{digits}f}" if value is not None and unit else f"{'-':>10}"


def results_plot(rows: Sequence[Row]) -> Figure:
    """Time and peak memory against the number of positions; solid lines fast, dashed dense."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = sorted({_curve_name(row) for row in rows})
    quantities = ("seconds", 1e-3, "time, ms"), ("bytes", MIB, "peak memory, MiB")
    for axis, (key, unit, label) in zip(axes, quantities):
        for (i, name), (form, style) in product(
            enumerate(curves), (("fast", "o-"), ("dense", "s--"))
        ):
            points = sorted(
                (_num_positions(row), row[f"{form}_{key}"] / unit)
                for row in rows
                if _curve_name(row) == name and f"{form}_{key}" in row
            )
            if points:
                axis.plot(*zip(*points), style, color=f"C{i}", label=f"{name}, {form}")
        axis.set(xscale="log", yscale="log", xlabel="positions", ylabel=label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    return figure


def _curve_name(row: Row) -> str:
    case = row["case"]
    channels = f"{case['shape'][0]} channels"
    return f"{case['pairwise']} {case['target']}, {channels}, {case['dtype']}, {case['mode']}"


def _num_positions(row: Row) -> int:
    return torch.Size(row["case"]["shape"][1:]).numel()


def write_results(folder: str, machine: dict[str, object], rows: Sequence[Row]) -> None:
    """Write the `FILES` into an existing folder."""
    table, plot = (os.path.join(folder, name) for name in FILES)
    with atomic_write(table) as file:
        json.dump({"machine": machine, "rows": list(rows)}, file, indent=2)
    save_figure(results_plot(rows), plot)
