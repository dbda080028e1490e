"""Are the maps about the query at all? Numbers for each block, from recorded calls.

Cao et al. (GCNet, arXiv 1904.11492, section 3.2) found that non-local blocks, as trained, give
almost the same map to every query. Their measure, for N queries with vectors v_1 ... v_N:

    average distance = mean over i != j of (1 - cos(v_i, v_j)) / 2

which is 0 where all queries agree, 1/2 where their vectors are orthogonal, and 1 where they are
opposite, for the maps, for what the block adds to its input, and, to compare, for that input.

Entropy is that of a map's magnitudes, scaled to sum to one, over the logarithm of the number of
keys: 1 for a uniform map, 0 for a single key.

Padding takes no part. Deviations: pairs of a query with itself are left out, queries are sampled.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Optional

import numpy as np
from matplotlib.figure import Figure

from ..utils.plotting import save_figure
from .geometry import Grid
from .recorder import AttentionRecorder


@dataclass(frozen=True)
class AttentionStats:
    """One block's numbers; NaN where there is nothing to compare.

    Attributes:
        maps: average distance of the maps.
        added: average distance of what the block adds.
        inputs: average distance of the block's input.
        entropy: of the maps, against uniform.
        gain: norm of what the block adds over the norm of its input.
    """

    maps: float
    added: float
    inputs: float
    entropy: float
    gain: float


def average_distance(vectors: np.ndarray) -> float:
    """The mean over pairs of the (N, D) vectors of (1 - cosine) / 2; NaN if no two are nonzero."""
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors[norms > 0].astype(np.float64) / norms[norms > 0, None]
    count = len(units)
    if count < 2:
        return math.nan
    # The sum over all pairs is the square of the sum; each vector with itself gives one.
    cosine = (np.square(units.sum(axis=0)).sum() - count) / (count * (count - 1))
    return float((1 - cosine) / 2)


def relative_entropy(weights: np.ndarray) -> float:
    """The mean entropy of the rows of (N, K), 1 if uniform; NaN if K is 1 or all rows are zero."""
    magnitudes = np.abs(weights.astype(np.float64))
    totals = magnitudes.sum(axis=1)
    if weights.shape[1] < 2 or not (totals > 0).any():
        return math.nan
    shares = magnitudes[totals > 0] / totals[totals > 0, None]
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return float(-(shares * logs).sum(axis=1).mean() / math.log(weights.shape[1]))


def measure(
    recorder: AttentionRecorder,
    block: str,
    *,
    image: int = 0,
    queries: int = 64,
    regions: int = 8,
    seed: int = 0,
) -> Optional[AttentionStats]:
    """A block's numbers on one image of the recorded call.

    Args:
        recorder: holds the call.
        block: a name.
        image: index in the batch.
        queries: how many cells are compared, at most, chosen at random.
        regions: for a block in a head, the number of regions over which numbers are averaged.
        seed: of that choice.

    Returns:
        None for a block in a head where there is no region.

    Raises:
        KeyError: if the call did not reach the block.
    """
    boxes = recorder.regions(block, image=image)
    chosen: Sequence[Optional[int]] = [None]
    if boxes is not None:
        chosen = range(min(len(boxes), regions))
    rng = np.random.default_rng(seed)
    return mean(_measure_one(recorder, block, image, region, queries, rng) for region in chosen)


def _measure_one(
    recorder: AttentionRecorder,
    block: str,
    image: int,
    region: Optional[int],
    queries: int,
    rng: np.random.Generator,
) -> AttentionStats:
    cells = _sample(recorder.grid(block, image=image, region=region), queries, rng)
    maps, _ = recorder.weights(block, cells, image=image, region=region)
    maps = maps.reshape(len(maps), -1)
    inputs, added = recorder.features(block, cells, image=image, region=region)
    return AttentionStats(
        maps=average_distance(maps),
        added=average_distance(added),
        inputs=average_distance(inputs),
        entropy=relative_entropy(maps),
        gain=float(np.linalg.norm(added) / max(np.linalg.norm(inputs), 1e-30)),
    )


def _sample(grid: Grid, queries: int, rng: np.random.Generator) -> np.ndarray:
    """(Q, 2) different cells as (column, row)."""
    total = grid.columns * grid.rows
    chosen = rng.choice(total, size=min(queries, total), replace=False)
    return np.stack([chosen % grid.columns, chosen // grid.columns], axis=1)


def mean(numbers: Iterable[Optional[AttentionStats]]) -> Optional[AttentionStats]:
    """The mean of each number, NaN and None aside; None if there is none."""
    rows = np.array([astuple(n) for n in numbers if n is not None])
    if not len(rows):
        return None
    known = ~np.isnan(rows)
    sums = np.where(known, rows, 0).sum(axis=0)
    return AttentionStats(
        *(float(s / c) if c else math.nan for s, c in zip(sums, known.sum(axis=0)))
    )


def write_table(numbers: Mapping[str, AttentionStats], path: str) -> None:
    """A CSV file with a row for each block."""
    names = [field.name for field in fields(AttentionStats)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["block", *names])
        writer.writerows(
            [block, *(f"{value:.6g}" for value in astuple(n))] for block, n in numbers.items()
        )


def plot(numbers: Mapping[str, AttentionStats], path: str) -> None:
    """Bars of the distances, and the entropy, of each block; as the ending of ``path`` says."""
    figure = Figure(figsize=(6.5, 1.1 + 0.55 * len(numbers)), dpi=200, layout="constrained")
    distances, entropy = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = np.arange(len(numbers))
    series = (
        ("inputs", "input", "#c9c9c9"),
        ("maps", "maps", "#0072B2"),
        ("added", "added", "#E69F00"),
    )
    for row, (name, label, color) in enumerate(series):
        values = [getattr(n, name) for n in numbers.values()]
        distances.barh(places + (row - 1) * 0.26, values, height=0.24, color=color, label=label)
    entropy.barh(places, [n.entropy for n in numbers.values()], height=0.5, color="#009E73")
    entropy.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    names = [".".join(block.split(".")[-2:]) for block in numbers]
    distances.set_yticks(places, names, fontsize=8)
    distances.invert_yaxis()
    distances.set_xlabel("average cosine distance between queries", fontsize=8)
    distances.set_xlim(left=0)
    distances.legend(fontsize=7, frameon=False, loc="best")
    entropy.set_xlabel("entropy / uniform", fontsize=8)
    entropy.set_xlim(0, 1.05)
    for axes in (distances, entropy):
        axes.tick_params(labelsize=7, length=2)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, os.path.abspath(path))
