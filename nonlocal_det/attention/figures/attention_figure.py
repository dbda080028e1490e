"""Figures: the detections of an image beside the attention map of each of them.

Figures are matplotlib's, created without its global state; `nonlocal_det.attention.save_figure`
writes them as PNG or PDF.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Optional

import cv2
import matplotlib
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from matplotlib.figure import Figure

from ...utils.deprecation import renamed_arguments
from ...utils.plotting import FIGURE_STYLE
from ..recording.query import AttentionQuery, queries_from_instances, query_rows
from ..recording.recorder import AttentionRecorder
from .instance_overlay import overlay_instances
from .layout import FigureLayout, grid_shape
from .overlay import (
    ACCENT,
    SIGNED_ACCENT,
    draw_arrows,
    draw_box,
    is_signed,
    max_magnitude,
    overlay_attention,
    resize_longest_side,
)

OVERVIEW_LENGTH = 1200  # pixels of the longer side of the overview image


@renamed_arguments(heat="attn_map", look="query", targets="top_keys", longest="target_length")
def attention_panel(
    image: np.ndarray,
    attn_map: np.ndarray,
    query: AttentionQuery,
    top_keys: Sequence[tuple[float, float, float]] = (),
    *,
    signed: Optional[bool] = None,
    target_length: int = 480,
) -> np.ndarray:
    """Draw an attention map over its image, with the query, its box, and arrows to keys.

    Args:
        image: RGB uint8 image (H, W, 3), the original image.
        attn_map: Attention map (H, W), as from `AttentionRecorder.attention_maps`.
        query: Query of the attention map.
        top_keys: Keys (x, y, weight) that get an arrow, as from `AttentionRecorder.top_k`.
        signed: Use a diverging colormap around zero. Default: if a weight is negative.
        target_length: Length of the longer side of the result in pixels.

    Returns:
        RGB uint8 image.
    """
    resized, factor = resize_longest_side(image, target_length)
    size = resized.shape[1::-1]
    vmax = max_magnitude(attn_map)
    attn_map = cv2.resize(attn_map.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    signed = is_signed(attn_map) if signed is None else signed
    color = SIGNED_ACCENT if signed else ACCENT
    result = overlay_attention(resized, attn_map, vmax=vmax, signed=signed)
    if query.box is not None:
        result = draw_box(result, [v * factor for v in query.box], color=color)
    scaled = [(x * factor, y * factor, weight) for x, y, weight in top_keys]
    point = (query.point[0] * factor, query.point[1] * factor)
    return draw_arrows(result, point, scaled, color=color)


@renamed_arguments(
    count="max_detections", arrows="num_arrows", index="image_index", by_class="color_by_class"
)
def detection_figure(
    image: np.ndarray,
    instances: Instances,
    recorder: AttentionRecorder,
    *,
    metadata: Optional[Metadata] = None,
    blocks: Optional[Sequence[str]] = None,
    max_detections: int = 6,
    num_arrows: int = 10,
    image_index: int = 0,
    color_by_class: bool = False,
) -> Figure:
    """Draw the detections of an image, and the attention map of the center of each.

    The panels of a single block form a grid; several blocks get a row each.

    Args:
        image: RGB uint8 image (H, W, 3), the original image.
        instances: Predictions of the recorded call for this image.
        recorder: Recorder that holds the call.
        metadata: Metadata of a dataset with the model's classes and keypoints, for their names.
        blocks: Names of the blocks to draw. Default: all recorded blocks.
        max_detections: Maximum number of detections, highest score first.
        num_arrows: Maximum number of arrows in a panel, to the keys of largest magnitude.
        image_index: Index of the image in the batch.
        color_by_class: Draw detections in the ``thing_colors`` of the metadata, if it has any,
            instead of in a different color each.

    Returns:
        matplotlib figure, to be saved with `nonlocal_det.attention.save_figure`.

    Raises:
        KeyError: If a block was not recorded.
    """
    instances = instances.to("cpu")
    instances = instances[instances.scores.argsort(descending=True)[:max_detections]]
    queries = queries_from_instances(instances, getattr(metadata, "thing_classes", None))
    colors = None
    palette = np.asarray(getattr(metadata, "thing_colors", ())) / 255
    if color_by_class and len(palette):
        colors = [tuple(palette[i % len(palette)]) for i in instances.pred_classes.tolist()]
    overview = overlay_instances(
        resize_longest_side(image, OVERVIEW_LENGTH)[0],
        instances,
        [query.label for query in queries],
        metadata=metadata,
        colors=colors,
    )
    return attention_figure(
        image,
        queries,
        recorder,
        overview=overview,
        blocks=blocks,
        num_arrows=num_arrows,
        image_index=image_index,
    )


@renamed_arguments(looks="queries", arrows="num_arrows", index="image_index")
def attention_figure(
    image: np.ndarray,
    queries: Sequence[AttentionQuery],
    recorder: AttentionRecorder,
    *,
    overview: np.ndarray,
    blocks: Optional[Sequence[str]] = None,
    num_arrows: int = 10,
    image_index: int = 0,
) -> Figure:
    """Draw the attention maps of queries beside an overview image.

    Args:
        image: RGB uint8 image (H, W, 3), the original image.
        queries: Queries to draw, one panel for each block and query.
        recorder: Recorder that holds the call.
        overview: RGB uint8 image of any size, drawn large on the left.
        blocks: Names of the blocks to draw. Default: all recorded blocks.
        num_arrows: Maximum number of arrows in a panel, to the keys of largest magnitude.
        image_index: Index of the image in the batch.

    Returns:
        matplotlib figure, to be saved with `nonlocal_det.attention.save_figure`.

    Raises:
        KeyError: If a block was not recorded.
        ValueError: If a query lies outside the image.
    """
    blocks = recorder.recorded_blocks if blocks is None else list(blocks)
    aspect = image.shape[1] / image.shape[0]
    layout = FigureLayout(aspect, *grid_shape(len(queries), len(blocks), aspect))
    panels = chain.from_iterable(
        _panels(image, queries, recorder, block, num_arrows, image_index, layout.panel_length)
        for block in blocks
    )
    signs = set()
    with matplotlib.rc_context(FIGURE_STYLE):
        layout.add_overview(overview, _title(queries))
        for number, (query, weights, panel) in enumerate(panels):
            signs.add(is_signed(weights))
            layout.add_panel(number, panel, query.label, max_magnitude(weights))
        if len(blocks) > 1 and queries:
            layout.add_row_names([".".join(block.split(".")[-2:]) for block in blocks])
        layout.add_color_bars(signs)
    return layout.figure


def _title(queries: Sequence[AttentionQuery]) -> str:
    if not queries:
        return "no detection"
    return "detections" if queries[0].box is not None else "points"


def _panels(
    image: np.ndarray,
    queries: Sequence[AttentionQuery],
    recorder: AttentionRecorder,
    block: str,
    num_arrows: int,
    image_index: int,
    target_length: int,
) -> Iterator[tuple[AttentionQuery, np.ndarray, np.ndarray]]:
    """Each query with its attention weights in one block and its panel."""
    height, width = image.shape[:2]
    rows = query_rows(recorder, block, queries, image_index)
    for query, (weights, grid) in zip(queries, rows):
        attn_map = grid.to_image(weights[None], width, height)[0]
        top_keys = grid.top_k(weights, num_arrows)
        panel = attention_panel(image, attn_map, query, top_keys, target_length=target_length)
        yield query, weights, panel
