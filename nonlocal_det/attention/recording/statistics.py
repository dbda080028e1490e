"""Attention statistics: does a block's attention depend on the query?

Cao et al. (GCNet, arXiv 1904.11492, Section 3.2) found that trained non-local blocks have almost
the same attention map for every query. Their measure, for N queries with vectors v_1 ... v_N:

    average distance = mean over i != j of (1 - cos(v_i, v_j)) / 2

is 0 if all vectors have the same direction, 1/2 if they are orthogonal, and 1 for two opposite
ones. It is computed for the attention maps, for the block's output before fusion (the residual that
it adds to its input), and, for comparison, for its input.

Entropy is the Shannon entropy of the magnitudes of a map, normalized to sum to one, divided by the
logarithm of the number of keys: 1 for a uniform map, 0 for a single key.

Deviations from the paper: pairs of a query with itself are excluded, and queries are sampled.
Padding is excluded.

Shape symbols: N vectors, D their length, Q queries, K keys.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model
from matplotlib.figure import Figure

from ...checkpoint.detection_checkpoint import NonLocalCheckpointer
from ...utils.plotting import save_figure
from .geometry import Grid
from .recorder import AttentionRecorder


@dataclass(frozen=True)
class AttentionStats:
    """Statistics of one block; NaN where they are undefined.

    Attributes:
        att_distance: Average distance between the attention maps of different queries.
        output_distance: Average distance between the block's outputs before fusion.
        input_distance: Average distance between the block's inputs.
        entropy: Mean entropy of the attention maps, relative to a uniform map.
        residual_ratio: Norm of the output before fusion over the norm of the input.
    """

    att_distance: float
    output_distance: float
    input_distance: float
    entropy: float
    residual_ratio: float


def average_distance(vectors: np.ndarray) -> float:
    """Compute the mean of (1 - cosine) / 2 over all pairs of different vectors.

    Args:
        vectors: Vectors, shape (N, D); zero vectors are ignored.

    Returns:
        Average distance, or NaN if fewer than two vectors are nonzero.
    """
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors[norms > 0].astype(np.float64) / norms[norms > 0, None]
    count = len(units)
    if count < 2:
        return math.nan
    # Cosines over all pairs sum to the squared norm of the sum, of which each vector with itself
    # contributes one.
    cosine = (np.square(units.sum(axis=0)).sum() - count) / (count * (count - 1))
    return float((1 - cosine) / 2)


def relative_entropy(weights: np.ndarray, num_keys: Optional[np.ndarray] = None) -> float:
    """Compute the mean entropy of attention maps, divided by that of a uniform map.

    Args:
        weights: Attention weights, shape (Q, K); rows of zeros are ignored.
        num_keys: Number of keys that each query can attend to, shape (Q,); K by default. Rows with
            a single key are ignored.

    Returns:
        Mean relative entropy, or NaN if there is one key or all weights are zero.
    """
    magnitudes = np.abs(weights.astype(np.float64))
    totals = magnitudes.sum(axis=1)
    keys = np.broadcast_to(weights.shape[1] if num_keys is None else num_keys, len(weights))
    defined = (totals > 0) & (keys > 1)
    if not defined.any():
        return math.nan
    probabilities = magnitudes[defined] / totals[defined, None]
    logs = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return float(-((probabilities * logs).sum(axis=1) / np.log(keys[defined])).mean())


def residual_ratio(inputs: np.ndarray, residuals: np.ndarray) -> float:
    """Compute the norm of what a block adds to its input, over the norm of the input.

    Args:
        inputs: Input vectors of some positions.
        residuals: What the block adds to them, of the same shape.

    Returns:
        The ratio, or NaN if the input is zero.
    """
    norm = np.linalg.norm(inputs)
    return float(np.linalg.norm(residuals) / norm) if norm > 0 else math.nan


def attention_stats(
    recorder: AttentionRecorder,
    block: str,
    *,
    image_index: int = 0,
    num_queries: int = 64,
    num_rois: int = 8,
    seed: int = 0,
) -> Optional[AttentionStats]:
    """Compute the statistics of a block on one image of the recorded call.

    Args:
        recorder: Recorder that holds the call.
        block: Name of a recorded block.
        image_index: Index of the image in the batch.
        num_queries: Maximum number of query cells, sampled without replacement.
        num_rois: Maximum number of RoIs to average over, for a block in a head.
        seed: Random seed of the sampling.

    Returns:
        Statistics of the block, or None for a block in a head if there is no RoI.

    Raises:
        KeyError: If the block was not recorded.
    """
    boxes = recorder.roi_boxes(block, image_index=image_index)
    roi_indices: Sequence[Optional[int]] = [None]
    if boxes is not None:
        roi_indices = range(min(len(boxes), num_rois))
    rng = np.random.default_rng(seed)
    return mean_stats(
        _stats_of_grid(recorder, block, image_index, roi_index, num_queries, rng)
        for roi_index in roi_indices
    )


def _stats_of_grid(
    recorder: AttentionRecorder,
    block: str,
    image_index: int,
    roi_index: Optional[int],
    num_queries: int,
    rng: np.random.Generator,
) -> AttentionStats:
    """Statistics over one image, or over one RoI."""
    at = {"image_index": image_index, "roi_index": roi_index}
    cells = _sample_cells(recorder.grid(block, **at), num_queries, rng)
    weights, _ = recorder.attention_weights(block, cells, **at)
    weights = weights.reshape(len(weights), -1)
    inputs, residuals = recorder.input_and_residual(block, cells, **at)
    return AttentionStats(
        att_distance=average_distance(weights),
        output_distance=average_distance(residuals),
        input_distance=average_distance(inputs),
        entropy=relative_entropy(weights),
        residual_ratio=residual_ratio(inputs, residuals),
    )


def _sample_cells(grid: Grid, num_queries: int, rng: np.random.Generator) -> np.ndarray:
    """Sample different cells (column, row), shape (Q, 2)."""
    total = grid.columns * grid.rows
    indices = rng.choice(total, size=min(num_queries, total), replace=False)
    return np.stack([indices % grid.columns, indices // grid.columns], axis=1)


def mean_stats(stats: Iterable[Optional[AttentionStats]]) -> Optional[AttentionStats]:
    """Average statistics, ignoring None and NaN; None if nothing is left."""
    rows = np.array([astuple(s) for s in stats if s is not None])
    if not len(rows):
        return None
    defined = ~np.isnan(rows)
    sums = np.where(defined, rows, 0).sum(axis=0)
    return AttentionStats(
        *(float(s / c) if c else math.nan for s, c in zip(sums, defined.sum(axis=0)))
    )


def dataset_stats(
    cfg: CfgNode, dataset: str, *, num_images: int = 100, num_queries: int = 64
) -> dict[str, AttentionStats]:
    """Compute the mean statistics of each block over the first images of a dataset.

    Args:
        cfg: detectron2 config of the model, with ``MODEL.WEIGHTS``.
        dataset: Name of a registered dataset.
        num_images: Maximum number of images.
        num_queries: Maximum number of query cells sampled in each image.

    Returns:
        Mean statistics by block name; blocks that never ran are omitted.
    """
    model = build_model(cfg).eval()
    NonLocalCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    recorder, mapper = AttentionRecorder(model), DatasetMapper(cfg, is_train=False)
    stats: dict[str, list[Optional[AttentionStats]]] = {name: [] for name in recorder.block_names}
    for seed, dataset_dict in enumerate(DatasetCatalog.get(dataset)[:num_images]):
        with torch.no_grad(), recorder:
            model([mapper(dataset_dict)])
        for name in recorder.recorded_blocks:
            of_image = attention_stats(recorder, name, num_queries=num_queries, seed=seed)
            stats[name].append(of_image)
    means = {name: mean_stats(of_images) for name, of_images in stats.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def format_stats(stats: Mapping[str, AttentionStats]) -> str:
    """Format statistics by block name as a text table with a row for each block."""
    names = [field.name for field in fields(AttentionStats)]
    width = max(map(len, stats), default=5)
    lines = [" " * width + "".join(f"  {name}" for name in names)]
    for block, row in stats.items():
        values = (f"  {value:{len(name)}.4f}" for name, value in zip(names, astuple(row)))
        lines.append(f"{block:{width}}" + "".join(values))
    return "\n".join(lines)


def write_stats_csv(stats: Mapping[str, AttentionStats], path: str) -> None:
    """Write statistics by block name to a CSV file with a row for each block."""
    names = [field.name for field in fields(AttentionStats)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["block", *names])
        writer.writerows(
            [block, *(f"{value:.6g}" for value in astuple(row))] for block, row in stats.items()
        )


def plot_stats(stats: Mapping[str, AttentionStats], path: str) -> None:
    """Plot the distances and the entropy of each block as bars.

    Args:
        stats: Statistics by block name.
        path: Output file, whose extension sets the format, for instance .png or .pdf.
    """
    figure = Figure(figsize=(6.5, 1.1 + 0.55 * len(stats)), dpi=200, layout="constrained")
    distances, entropy = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    ys = np.arange(len(stats))
    series = (
        ("input_distance", "input", "#c9c9c9"),
        ("att_distance", "attention maps", "#0072B2"),
        ("output_distance", "output before fusion", "#E69F00"),
    )
    for row, (name, label, color) in enumerate(series):
        values = [getattr(s, name) for s in stats.values()]
        distances.barh(ys + (row - 1) * 0.26, values, height=0.24, color=color, label=label)
    entropy.barh(ys, [s.entropy for s in stats.values()], height=0.5, color="#009E73")
    entropy.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    distances.set_yticks(ys, [".".join(block.split(".")[-2:]) for block in stats], fontsize=8)
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
