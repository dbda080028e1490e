"""Is attention faithful: does a detection depend on what a block attends to?

Two measures, as for saliency maps of detectors in Petsiuk et al., "Black-box Explanation of Object
Detectors via Saliency Maps", CVPR 2021 (D-RISE): how attention and influence rank the cells of an
image, and what becomes of the class's probability as cells go, or come, in that order.

Shape symbols: N detections; S steps; R and C rows and columns of a grid over the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from ..recording.query import AttentionQuery, query_rows
from ..recording.recorder import AttentionRecorder
from .influence import Influence
from .regions import cell_indices

ORDERS = ("attention", "influence", "random")


@dataclass(frozen=True)
class Faithfulness:
    """What was measured of the detections of an image.

    Attributes:
        correlation: Spearman's rank correlation of attention and influence over the cells, (N,);
            nan where all cells are alike.
        deletion: By order, the probability of the class as the first cells of the order can no more
            be attended to, (N, S + 1), from none to all. The sooner it falls, the better the order.
        insertion: By order, the same as only they can be attended to. The sooner it rises, the
            better.
    """

    correlation: np.ndarray
    deletion: Mapping[str, np.ndarray]
    insertion: Mapping[str, np.ndarray]


def measure_faithfulness(
    recorder: AttentionRecorder,
    influence: Influence,
    queries: Sequence[AttentionQuery],
    *,
    block: str,
    rows: int,
    columns: int,
    steps: int = 8,
    seed: int = 0,
) -> Faithfulness:
    """Measure the faithfulness of a block's attention for the detections of an image.

    It takes R x C + 6 N S runs of what is after the block.

    Args:
        recorder: Recorder that holds a call for the image alone.
        influence: Influence on the detections, through the block.
        queries: The same detections.
        block: Name of the block, one that is not in a head.
        rows: Rows of the grid, R.
        columns: Columns of the grid, C.
        steps: Number of steps, S, of equally many cells.
        seed: Random seed of the random order.
    """
    shape = (len(queries), rows * columns)
    lost = influence.map(rows, columns).logit.reshape(shape)
    sums = [
        _of_cells(weights, cell_indices(grid, (rows, columns), grid.bounds[2:]), rows, columns)
        for weights, grid in query_rows(recorder, block, queries)
    ]
    attended = np.reshape(sums, shape)
    rng = np.random.default_rng(seed)
    chance = rng.permuted(np.tile(np.arange(rows * columns), (len(queries), 1)), axis=1)
    orders = {
        "attention": np.argsort(-np.abs(attended), axis=1, kind="stable"),
        "influence": np.argsort(-lost, axis=1, kind="stable"),
        "random": chance,
    }
    counts = np.linspace(0, rows * columns, steps + 1).round().astype(int)
    deletion, insertion = {}, {}
    for name, order in orders.items():
        first = _first_cells(order, counts)
        deletion[name] = _probabilities(influence, first, (rows, columns))
        insertion[name] = _probabilities(influence, ~first, (rows, columns))
    correlation = [_rank_correlation(a, b) for a, b in zip(np.abs(attended), lost)]
    return Faithfulness(np.array(correlation), deletion, insertion)


def _of_cells(weights: np.ndarray, indices: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Sums of weights over the cells of a grid (R, C)."""
    total = np.zeros((rows, columns))
    np.add.at(total, tuple(indices), weights)
    return total


def _first_cells(order: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether each cell is among the first ones of an order (N, K): boolean (N, S + 1, K)."""
    ranks = np.argsort(order, axis=1)
    return ranks[:, None, :] < counts[None, :, None]


def _probabilities(influence: Influence, hidden: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Probability (N, S + 1) of each detection without its own hidden cells (N, S + 1, K)."""
    before = influence.scores.probabilities.double().cpu().numpy()
    after = np.zeros(hidden.shape[:2])
    for i, of_detection in enumerate(hidden):
        change = influence.of_cells(of_detection.reshape(-1, *shape))
        after[i] = before[i] - change.probability[:, i]
    return after


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)
