"""Figures: the detections of a picture beside what each of them looks at.

Figures are matplotlib's, made without its global state; `save_figure` writes PNG and PDF.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Optional

import cv2
import matplotlib
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..utils.plotting import FIGURE_STYLE
from .geometry import Grid
from .overlay import (
    ACCENT,
    DIVERGING,
    SEQUENTIAL,
    SIGNED_ACCENT,
    draw_arrows,
    draw_box,
    is_signed,
    max_magnitude,
    overlay_attention,
    overlay_instances,
    resize_longest_side,
)
from .recorder import AttentionRecorder

# Lengths in inches, but pixels where named so.
_PANEL = 1.3  # the shorter side of a panel, unless its picture is long and low
_WIDEST = 3.9
_GAP = 0.12
_TITLE = 0.24
_BAR = 0.09
_DPI = 200


@dataclass(frozen=True)
class AttentionQuery:
    """One place of a picture, and the detection that it stands for, if any.

    Attributes:
        point: (x, y) in pixels of the original image.
        label: what the panel is called.
        box: (x0, y0, x1, y1) of the detection.
    """

    point: tuple[float, float]
    label: str = ""
    box: Optional[tuple[float, float, float, float]] = None


def queries_from_instances(
    instances: Instances, names: Optional[Sequence[str]] = None
) -> list[AttentionQuery]:
    """The centres of detections, labelled with number, name and score: "1 person 98%"."""
    boxes = instances.pred_boxes.tensor.cpu().numpy().astype(float)
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    looks = []
    for number, (box, index, score) in enumerate(zip(boxes, classes, scores), start=1):
        name = names[index] if names else f"class {index}"
        center = (float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2)
        looks.append(AttentionQuery(center, f"{number} {name} {score:.0%}", tuple(box.tolist())))
    return looks


def attention_panel(
    image: np.ndarray,
    heat: np.ndarray,
    look: AttentionQuery,
    targets: Sequence[tuple[float, float, float]] = (),
    *,
    signed: Optional[bool] = None,
    longest: int = 480,
) -> np.ndarray:
    """One map over its picture, with the place that asked, its box, and arrows to ``targets``.

    Args:
        image: RGB uint8 (H, W, 3).
        heat: (H, W), as `AttentionRecorder.attention` gives.
        look: the place.
        targets: (x, y, weight), as `AttentionRecorder.strongest` gives.
        signed: as in `draw.overlay_attention`.
        longest: pixels of the longer side of what is returned.

    Returns:
        RGB uint8.
    """
    picture, factor = resize_longest_side(image, longest)
    height, width = picture.shape[:2]
    limit = max_magnitude(heat)
    heat = cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    signed = is_signed(heat) if signed is None else signed
    color = SIGNED_ACCENT if signed else ACCENT
    result = overlay_attention(picture, heat, limit=limit, signed=signed)
    if look.box is not None:
        result = draw_box(result, [v * factor for v in look.box], color=color)
    scaled = [(x * factor, y * factor, weight) for x, y, weight in targets]
    point = (look.point[0] * factor, look.point[1] * factor)
    return draw_arrows(result, point, scaled, color=color)


def detection_figure(
    image: np.ndarray,
    instances: Instances,
    recorder: AttentionRecorder,
    *,
    metadata: Optional[Metadata] = None,
    blocks: Optional[Sequence[str]] = None,
    count: int = 6,
    arrows: int = 10,
    index: int = 0,
    by_class: bool = False,
) -> Figure:
    """The detections of one picture, and the attention of the centre of each.

    One block's panels fill a grid; several blocks take a row each.

    Args:
        image: RGB uint8 (H, W, 3), the original picture.
        instances: what the model found in it.
        recorder: holds the call that found it.
        metadata: of the dataset, for the names of classes and keypoints.
        blocks: names; by default all that the call reached.
        count: how many detections at most, the most certain first.
        arrows: how many of the strongest positions get an arrow.
        index: of the picture in the recorded batch.
        by_class: detections in the ``thing_colors`` of the metadata, if it has any, not each in
            a color of its own.

    Raises:
        KeyError: for a block that the call did not reach.
    """
    instances = instances.to("cpu")
    instances = instances[instances.scores.argsort(descending=True)[:count]]
    looks = queries_from_instances(instances, getattr(metadata, "thing_classes", None))
    colors = None
    palette = np.asarray(getattr(metadata, "thing_colors", ())) / 255
    if by_class and len(palette):
        colors = [tuple(palette[index]) for index in instances.pred_classes.tolist()]
    labels = [look.label for look in looks]
    overview = overlay_instances(
        resize_longest_side(image, 600)[0], instances, labels, metadata=metadata, colors=colors
    )
    return attention_figure(
        image, looks, recorder, overview=overview, blocks=blocks, arrows=arrows, index=index
    )


def attention_figure(
    image: np.ndarray,
    looks: Sequence[AttentionQuery],
    recorder: AttentionRecorder,
    *,
    overview: np.ndarray,
    blocks: Optional[Sequence[str]] = None,
    arrows: int = 10,
    index: int = 0,
) -> Figure:
    """Any places of one picture; ``overview`` is drawn large beside their panels.

    The other arguments are those of `detection_figure`.
    """
    blocks = recorder.recorded if blocks is None else list(blocks)
    aspect = image.shape[1] / image.shape[0]
    page = _Page(aspect, *_layout(len(looks), len(blocks), aspect))
    with matplotlib.rc_context(FIGURE_STYLE):
        page.overview(overview, _title(looks))
        signs = set()
        drawn = chain.from_iterable(
            _panels(image, looks, recorder, block, arrows, index) for block in blocks
        )
        for position, (look, values, picture) in enumerate(drawn):
            signs.add(is_signed(values))
            page.panel(position, picture, look.label, max_magnitude(values))
        if len(blocks) > 1 and looks:
            page.row_names([".".join(block.split(".")[-2:]) for block in blocks])
        page.bars(signs)
    return page.figure


def _title(looks: Sequence[AttentionQuery]) -> str:
    if not looks:
        return "no detection"
    return "detections" if looks[0].box is not None else "points"


def _panels(
    image: np.ndarray,
    looks: Sequence[AttentionQuery],
    recorder: AttentionRecorder,
    block: str,
    arrows: int,
    index: int,
) -> Iterator[tuple[AttentionQuery, np.ndarray, np.ndarray]]:
    """Each place with its weights in one block and the panel that shows them."""
    height, width = image.shape[:2]
    for look, (values, grid) in zip(looks, query_rows(recorder, block, looks, index)):
        heat = grid.spread(values[None], width, height)[0]
        yield look, values, attention_panel(image, heat, look, grid.strongest(values, arrows))


def query_rows(
    recorder: AttentionRecorder, block: str, looks: Sequence[AttentionQuery], index: int = 0
) -> list[tuple[np.ndarray, Grid]]:
    """`AttentionRecorder.rows` for places with or without boxes."""
    points = [look.point for look in looks]
    boxed = looks and all(look.box is not None for look in looks)
    boxes = [look.box for look in looks] if boxed else None
    return recorder.rows(block, points, image=index, boxes=boxes)


def _layout(looks: int, blocks: int, aspect: float) -> tuple[int, int]:
    """Columns and rows: a row for each block; for a single one a grid, or a list if they are long.

    A grid is not higher than three.
    """
    if looks == 0 or blocks == 0:
        return 0, 1
    if blocks > 1:
        return looks, blocks
    if aspect * _PANEL > _WIDEST:
        return 1, looks
    rows = 1 if looks < 2 else 2 if looks <= 8 else 3
    return -(-looks // rows), rows


class _Page:
    """A figure laid out in inches, from its top left corner.

    The overview is as high as two rows of panels; the colour bars are to their right.
    """

    def __init__(self, aspect: float, columns: int, rows: int) -> None:
        self._columns = columns
        self._wide = min(_PANEL * max(aspect, 1.0), _WIDEST)
        self._high = self._wide / aspect
        self._height = rows * (self._high + _TITLE) + (rows - 1) * _GAP / 2
        self._bars_high = max(self._height - _TITLE, self._high)
        self._overview_high = min(self._bars_high, 2 * self._high + _TITLE)
        self._left = self._overview_high * aspect + 3 * _GAP
        self._width = self._left + columns * (self._wide + _GAP) + 0.65
        self.figure = Figure(figsize=(self._width, self._height + _GAP), dpi=_DPI)

    def _axes(self, x: float, y: float, width: float, height: float) -> Axes:
        total = self._height + _GAP
        box = (x / self._width, 1 - (y + height) / total, width / self._width, height / total)
        return self.figure.add_axes(box)

    def _show(self, axes: Axes, image: np.ndarray, title: str) -> None:
        axes.imshow(image, aspect="auto", interpolation="antialiased")
        axes.set_axis_off()
        axes.set_title(title, loc="left", pad=3, fontsize=7.5)

    def overview(self, image: np.ndarray, title: str) -> None:
        self._show(
            self._axes(_GAP, _TITLE, self._left - 3 * _GAP, self._overview_high), image, title
        )

    def panel(self, position: int, image: np.ndarray, title: str, largest: float) -> None:
        row, column = divmod(position, self._columns)
        x = self._left + column * (self._wide + _GAP)
        y = _TITLE + row * (self._high + _TITLE + _GAP / 2)
        axes = self._axes(x, y, self._wide, self._high)
        self._show(axes, image, title)
        axes.set_title(f"max {largest:.2g}", loc="right", pad=3, fontsize=6, color="0.45")

    def row_names(self, names: Sequence[str]) -> None:
        for row, name in enumerate(names):
            y = _TITLE + row * (self._high + _TITLE + _GAP / 2) + self._high / 2
            at = ((self._left - 0.7 * _GAP) / self._width, 1 - y / (self._height + _GAP))
            self.figure.text(
                *at, name, rotation=90, ha="right", va="center", fontsize=6, color="0.45"
            )

    def bars(self, signs: set[bool]) -> None:
        """A colour bar for each kind of map that is on the page."""
        high = (self._bars_high - 2 * _GAP * (len(signs) - 1)) / max(len(signs), 1)
        for number, signed in enumerate(sorted(signs)):
            axes = self._axes(self._width - 0.62, _TITLE + number * (high + 2 * _GAP), _BAR, high)
            scale = Normalize(-1 if signed else 0, 1)
            colors = ScalarMappable(scale, DIVERGING if signed else SEQUENTIAL)
            bar = self.figure.colorbar(
                colors, cax=axes, ticks=[-1, 0, 1] if signed else [0, 0.5, 1]
            )
            bar.set_label("weight / max", fontsize=6, labelpad=2)
            bar.outline.set_visible(False)
            axes.tick_params(length=2, width=0.5, labelsize=6, pad=2)
