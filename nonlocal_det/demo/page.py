"""The page of the demo: what both models reach, and what they make of the same images."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

import numpy as np
from PIL import Image

_TEMPLATE = os.path.join(os.path.dirname(__file__), "page.html")
CLASSES = ("without", "with")  # of the models, in the page's style
# The plot, in units of its view box.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 440, 260, 34, 40


@dataclass(frozen=True)
class View:
    """An image of the page.

    Attributes:
        title: Name of the image.
        strips: Its drawings, one for each model, RGB uint8.
        right: Number of shapes that each model gets right.
        total: Number of its shapes.
        explorer: Address of its explorer page, relative to the page.
    """

    title: str
    strips: tuple[np.ndarray, np.ndarray]
    right: tuple[int, int]
    total: int
    explorer: str


@dataclass(frozen=True)
class Row:
    """A model's row of the table, in percent; nan where there is no object.

    Attributes:
        name: Name of the model.
        near: Box AP, mask AP and share of shapes classified rightly, where the lamp is inside the
            stock model's receptive field.
        far: The same where it is outside.
        curve: Points (distance in pixels, box AP50).
    """

    name: str
    near: tuple[float, float, float]
    far: tuple[float, float, float]
    curve: Sequence[tuple[float, float]]


def demo_page(
    rows: Sequence[Row],
    views: Sequence[View],
    *,
    reach: float,
    lead: str,
    result: str,
    command: str,
    machine: str,
) -> str:
    """Create the page.

    Args:
        rows: The stock model's row, and that of the model with a block.
        views: Images to show.
        reach: Distance from which on the lamp is outside the stock model's receptive field, pixels.
        lead: First paragraph.
        result: Second paragraph.
        command: Command to try next.
        machine: What the numbers were measured on.

    Returns:
        HTML that needs no other file, but for the explorer pages that it links to.
    """
    texts = {"lead": lead, "result": result, "command": command, "machine": machine}
    with open(_TEMPLATE, encoding="utf-8") as file:
        template = Template(file.read())
    return template.substitute(
        {key: html.escape(text) for key, text in texts.items()},
        table=_table(rows, reach),
        plot=_plot(rows, reach),
        legend=_legend(rows),
        gallery="\n".join(map(_figure, views)),
    )


def number(percent: float) -> str:
    """A percentage with one decimal, or a dash for nan."""
    return "–" if math.isnan(percent) else f"{percent:.1f}"


def _table(rows: Sequence[Row], reach: float) -> str:
    columns = "<th>box AP</th><th>mask AP</th><th>right</th>" * 2
    body = "\n".join(
        f'<tr class="{style}"><th scope="row">{html.escape(row.name)}</th>'
        + "".join(f"<td>{number(value)}</td>" for value in (*row.near, *row.far))
        + "</tr>"
        for style, row in zip(CLASSES, rows)
    )
    return (
        f'<table><thead><tr><th rowspan="2"></th><th colspan="3">lamp nearer than {reach:.0f} px'
        f'</th><th colspan="3">lamp beyond</th></tr><tr>{columns}</tr></thead>'
        f"<tbody>\n{body}\n</tbody><caption>AP as of COCO, of the shapes with a lamp at that "
        f"distance. “Right”: percentage of them whose most confident detection is of their class."
        f"</caption></table>"
    )


def _plot(rows: Sequence[Row], reach: float) -> str:
    """The curves of both models, as SVG in the colors of the page."""
    longest = max((distance for row in rows for distance, _ in row.curve), default=reach)
    right, top = _WIDTH - 8, 12

    def x(distance: float) -> float:
        return _LEFT + distance / longest * (right - _LEFT)

    def y(percent: float) -> float:
        return _HEIGHT - _BOTTOM - percent / 100 * (_HEIGHT - _BOTTOM - top)

    parts = []
    for percent in (0, 25, 50, 75, 100):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(percent):.1f}H{right}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y(percent) + 4:.1f}" text-anchor="end">{percent}</text>'
        )
    limit = x(min(reach, longest))
    parts.append(f'<path class="limit" d="M{limit:.1f} {top}V{_HEIGHT - _BOTTOM}"/>')
    below = _HEIGHT - _BOTTOM
    parts.append(
        f'<text x="{limit + 6:.1f}" y="{below - 8}">outside the stock model’s receptive field'
        f" →</text>"
    )
    for style, row in zip(CLASSES, rows):
        points = [(x(d), y(p)) for d, p in row.curve if not math.isnan(p)]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="line {style}" points="{line}"/>')
        parts += [
            f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="3.5"/>' for px, py in points
        ]
    for distance in range(0, int(longest) + 1, 100):
        parts.append(
            f'<text x="{x(distance):.1f}" y="{below + 18}" text-anchor="middle">{distance}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{below + 36}" text-anchor="middle">'
        f"distance from the lamp, pixels</text>"
    )
    label = "Box AP50 over the distance from the lamp: " + "; ".join(
        f"{row.name} " + ", ".join(f"{number(p)} at {d:.0f} px" for d, p in row.curve)
        for row in rows
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _legend(rows: Sequence[Row]) -> str:
    return " ".join(
        f'<span class="{style}">● {html.escape(row.name)}</span>'
        for style, row in zip(CLASSES, rows)
    )


def _figure(view: View) -> str:
    parts = []
    for name, strip, right in zip(("without a block", "with a block"), view.strips, view.right):
        wrong = "" if right == view.total else ' class="wrong"'
        said = f"{right} of {view.total} right"
        link = ""
        if name.startswith("with a"):
            link = f'<a href="{html.escape(view.explorer)}">explore its attention →</a>'
        parts.append(
            f'<div class="said"><span><b>{name}</b>: <span{wrong}>{said}</span></span>{link}</div>'
            f'<img src="{_data_url(strip)}" width="{strip.shape[1]}" height="{strip.shape[0]}" '
            f'alt="{html.escape(view.title)}, {name}: {said}.">'
        )
    return f"<figure>{''.join(parts)}</figure>"


def _data_url(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
