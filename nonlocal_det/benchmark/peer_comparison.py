"""Comparison of our blocks with those of other packages: outputs first, then time and memory.

A block whose outputs differ from ours is not timed. Ours and the other alternate, each time in a
process of its own; a ratio, ours over the other, is taken from every such pair of processes.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import is_out_of_memory, summarize_error
from .cases import Case, fits_in_memory, make_function, precision
from .measure import Runs, in_new_process, measure_in_turn, medians

# Of the largest value. Float32 rounds to 6e-8 of it, but a batch norm in training subtracts what
# positions share and enlarges the rest. Another function is much farther away.
TOLERANCE = 1e-3


def measure_peer(case: Case, repeats: int) -> dict[str, Any]:
    """Compare the outputs of our block and a peer's; if they agree, measure both.

    Args:
        case: Case with a peer; its ``form`` is ignored.
        repeats: Number of measurements of each.

    Returns:
        The ``case`` and its ``name``; if memory sufficed, the result of `compare_outputs`. If both
        were measured, ``fast_`` and ``peer_`` with ``seconds`` and ``bytes``, medians, and
        ``seconds_ratio`` and ``bytes_ratio``, each with ``median``, ``min`` and ``max`` over the
        pairs; otherwise why not, ``not_timed``.
    """
    row: dict[str, Any] = {"case": asdict(case), "name": case.name}
    if not fits_in_memory(case):
        return {**row, "not_timed": "it needs more memory than is free"}
    try:
        row.update(in_new_process(compare_outputs, case))
        if not row["relative_difference"] <= TOLERANCE:  # nor if it is NaN
            return {**row, "not_timed": f"its results differ by {row['difference']:.2g}"}
        runs = measure_in_turn(case, ("fast", "peer"), repeats)
    except RuntimeError as error:
        failed = "it ran out of memory" if is_out_of_memory(error) else summarize_error(error)
        return {**row, "not_timed": failed}
    return {**row, **medians(runs), **_ratios(runs)}


def compare_outputs(case: Case) -> dict[str, float]:
    """Compare the outputs of our block and the peer's, in training input gradients too, in float32.

    Returns:
        The largest ``difference``, and the largest ``relative_difference``: in proportion to the
        largest value of the peer's output, or of its gradient.
    """
    with precision("float32"):
        results = [_results(replace(case, form=form, dtype="float32")) for form in ("fast", "peer")]
    differences = [_largest(ours - theirs) for ours, theirs in zip(*results)]
    sizes = map(_largest, results[1])
    return {
        "difference": max(differences),
        "relative_difference": max(d / size for d, size in zip(differences, sizes)),
    }


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _results(case: Case) -> list[Tensor]:
    """The output, and in training the gradient of the input, from seeded weights and input."""
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    function, (x,) = make_function(case)
    if not x.requires_grad:
        with torch.inference_mode():
            return [function(x)]
    y = function(x)
    y.backward(torch.randn_like(y))
    return [y.detach(), x.grad]


def _ratios(runs: Runs) -> dict[str, dict[str, float]]:
    """Ratios of ours over the peer's, from each pair of runs; none of a memory of 0."""
    found = {}
    for key in ("seconds", "bytes"):
        pairs = [(ours[key], theirs[key]) for ours, theirs in zip(runs["fast"], runs["peer"])]
        if all(theirs > 0 for _, theirs in pairs):
            ratios = [ours / theirs for ours, theirs in pairs]
            found[f"{key}_ratio"] = {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
    return found
