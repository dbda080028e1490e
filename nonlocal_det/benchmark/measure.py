"""Measurements of benchmark cases, each in a process of its own: seconds and peak memory.

Peak memory is what a call adds to its inputs: on a CPU the resident set, on a GPU the allocations
of PyTorch.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from .cases import DTYPES, Case, fits_in_memory, make_function, minimum_operations, precision
from .peers import PEERS

Runs = dict[str, list[dict[str, float]]]


def measure_forms(case: Case, repeats: int, skip_dense: bool = False) -> dict[str, object]:
    """Measure the implementations of a case in turn.

    Args:
        case: Case to measure; its ``form`` is ignored.
        repeats: Number of measurements of each implementation.
        skip_dense: Whether to leave the dense implementation out; it is also left out where
            memory cannot hold it.

    Returns:
        The ``case``, its ``name``, and for each form ``<form>_seconds`` and ``<form>_bytes``,
        medians over the repetitions; ``matmul_rate``, the best operations per second of a matrix
        product; and ``floor_seconds``, the time of the case's own matrix products at that rate.
    """
    forms = ["fast"]
    if not skip_dense and fits_in_memory(case):
        forms.append("dense")
    if case.target == "block":
        forms.append("convolutions")
    runs = measure_in_turn(case, forms, repeats)
    row: dict[str, object] = {"case": asdict(case), "name": case.name, **medians(runs)}
    row["matmul_rate"] = max(run["rate"] for of_form in runs.values() for run in of_form)
    row["floor_seconds"] = minimum_operations(case) / row["matmul_rate"]
    return row


def measure_in_turn(case: Case, forms: Sequence[str], repeats: int) -> Runs:
    """Measure forms of a case alternately, each time in a process of its own."""
    runs: Runs = {form: [] for form in forms}
    for _, form in product(range(repeats), forms):
        runs[form].append(in_new_process(measure, replace(case, form=form)))
    return runs


def medians(runs: Runs) -> dict[str, float]:
    """The medians ``<form>_seconds`` and ``<form>_bytes`` of `measure_in_turn`."""
    return {
        f"{form}_{key}": statistics.median(run[key] for run in of_form)
        for form, of_form in runs.items()
        for key in ("seconds", "bytes")
    }


def in_new_process(function: Callable[[Case], dict[str, float]], case: Case) -> dict[str, float]:
    """Call a function in a fresh process, forked from a server that has imported the code.

    Raises:
        RuntimeError: If the process dies, which is mostly for lack of memory.
    """
    context = multiprocessing.get_context("forkserver")
    peers = {peer.module for peer in PEERS.values()} & sys.modules.keys()
    context.set_forkserver_preload(["nonlocal_det.layers", *sorted(peers)])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, case).result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"The process for {case.name} ({case.form}) died, perhaps out of memory; give a "
            f"smaller --shape or --batch-size, or --skip-dense."
        ) from error


def measure(case: Case) -> dict[str, float]:
    """Measure one implementation of a case in this process.

    Returns:
        ``seconds`` per call, ``bytes`` of peak memory, and ``rate``, the operations per second of
        the best matrix product.
    """
    torch.set_num_threads(case.threads)
    with precision(case.dtype):
        return {**measure_calls(case), "rate": matmul_rate(case)}


def measure_calls(case: Case, budget: float = 2.0) -> dict[str, float]:
    """``seconds`` and ``bytes`` of `measure`; timing takes about ``budget`` seconds."""
    torch.manual_seed(0)
    tiny = replace(case, shape=(case.shape[0], *(2 for _ in case.shape[1:])))
    _call(*make_function(tiny))  # loads code
    function, inputs = make_function(case)
    peak = peak_memory(case.device, lambda: _call(function, inputs))
    seconds = median_seconds(case.device, lambda: _call(function, inputs), budget)
    return {"seconds": seconds, "bytes": peak}


def _call(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Run forward and, if the inputs require gradients, backward."""
    if inputs[0].requires_grad:
        y = function(*inputs)
        y.backward(torch.ones_like(y))
        for x in inputs:
            x.grad = None
    else:
        with torch.inference_mode():
            function(*inputs)


def median_seconds(device: str, run: Callable[[], object], budget: float = 2.0) -> float:
    """Median seconds of 3 to 50 calls, which take about ``budget`` seconds in total."""
    seconds: list[float] = []
    while len(seconds) < 3 or (
        len(seconds) < 50 and len(seconds) * statistics.median(seconds) < budget
    ):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_rate(case: Case) -> float:
    """Operations per second of the faster of two matrix products: as wide as the case's, square."""
    n, options = 2048, {"dtype": DTYPES[case.dtype], "device": case.device}
    rates = []
    for width in (case.inner_channels, n):
        a, b = torch.randn(n, width, **options), torch.randn(width, n, **options)
        out = torch.empty(n, n, **options)
        multiply = partial(torch.mm, a, b, out=out)
        multiply()  # warms up
        seconds = median_seconds(case.device, multiply, budget=0.3)
        rates.append(2 * n * n * width / seconds)
    return max(rates)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str, run: Callable[[], object]) -> float:
    """Peak memory of a call in bytes, in addition to what is held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return float(torch.cuda.max_memory_allocated() - before)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> float:
    """Resident set of this process in bytes: now (VmRSS) or at its peak (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field))
    return float(line.split()[1]) * 1024
