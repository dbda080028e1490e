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


@dataclass(frozen=True)
class View:
    """An image of the page.

    Attributes:
        title: Name of the image.
        strips: Its drawings, one for each model, RGB uint8.
        correct: Number of shapes that each model classifies correctly.
        total: Number of its shapes.
        explorer: Address of its explorer page, relative to the page.
    """

    title: str
    strips: tuple[np.ndarray, np.ndarray]
    correct: tuple[int, int]
    total: int
    explorer: str


@dataclass(frozen=True)
class Row:
    """A model's row of the table, in percent; nan where there is no object.

    Attributes:
        name: Name of the model.
        near: Box AP, mask AP and share of shapes classified correctly, where the lamp is inside the
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
    columns = "<th>box AP</th><th>mask AP</th><th>correct</th>" * 2
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
        f"distance. “Correct”: percentage of them whose most confident detection is of their class."
        f"</caption></table>"
    )


@dataclass(frozen=True)
class _Axes:
    """The plot's coordinates, in units of its view box.

    Attributes:
        longest: Largest distance, in pixels of the images.
    """

    longest: float
    left: float = 34
    right: float = 432
    top: float = 12
    bottom: float = 220

    def x(self, distance: float) -> float:
        """Coordinate of a distance in pixels."""
        return self.left + distance / self.longest * (self.right - self.left)

    def y(self, percent: float) -> float:
        """Coordinate of an AP in percent."""
        return self.bottom - percent / 100 * (self.bottom - self.top)


def _plot(rows: Sequence[Row], reach: float) -> str:
    """The curves of both models, as SVG in the colors of the page."""
    longest = max((distance for row in rows for distance, _ in row.curve), default=reach)
    axes = _Axes(longest)
    label = "Box AP50 over the distance from the lamp: " + "; ".join(
        f"{row.name} " + ", ".join(f"{number(p)} at {d:.0f} px" for d, p in row.curve)
        for row in rows
    )
    curves = "".join(_curve(axes, style, row) for style, row in zip(CLASSES, rows))
    return (
        f'<svg viewBox="0 0 440 260" role="img" aria-label="{html.escape(label)}">'
        f"{_scales(axes)}{_limit(axes, reach)}{curves}</svg>"
    )


def _scales(axes: _Axes) -> str:
    """Grid lines and numbers of both axes."""
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = axes.y(percent)
        parts.append(f'<path class="grid" d="M{axes.left} {y:.1f}H{axes.right}"/>')
        parts.append(_text(axes.left - 6, y + 4, str(percent), "end"))
    parts += [
        _text(axes.x(distance), axes.bottom + 18, str(distance), "middle")
        for distance in range(0, int(axes.longest) + 1, 100)
    ]
    middle = (axes.left + axes.right) / 2
    return "".join(parts) + _text(
        middle, axes.bottom + 36, "distance from the lamp, pixels", "middle"
    )


def _limit(axes: _Axes, reach: float) -> str:
    """The end of the stock model's receptive field."""
    x = axes.x(min(reach, axes.longest))
    line = f'<path class="limit" d="M{x:.1f} {axes.top}V{axes.bottom}"/>'
    return line + _text(
        x + 6, axes.bottom - 8, "outside the stock model’s receptive field →", "start"
    )


def _curve(axes: _Axes, style: str, row: Row) -> str:
    points = [(axes.x(d), axes.y(p)) for d, p in row.curve if not math.isnan(p)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
    return f'<polyline class="line {style}" points="{line}"/>{"".join(dots)}'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _legend(rows: Sequence[Row]) -> str:
    return " ".join(
        f'<span class="{style}">● {html.escape(row.name)}</span>'
        for style, row in zip(CLASSES, rows)
    )


def _figure(view: View) -> str:
    """An image as both models see it, with a link to its explorer page."""
    names = ("without a block", "with a block")
    link = f'<a href="{html.escape(view.explorer)}">explore its attention →</a>'
    parts = []
    for name, strip, correct, more in zip(names, view.strips, view.correct, ("", link)):
        style = "" if correct == view.total else ' class="wrong"'
        said = f"{correct} of {view.total} correct"
        parts.append(
            f'<div class="said"><span><b>{name}</b>: <span{style}>{said}</span></span>{more}</div>'
            f'<img src="{_data_url(strip)}" width="{strip.shape[1]}" height="{strip.shape[0]}" '
            f'alt="{html.escape(view.title)}, {name}: {said}.">'
        )
    return f"<figure>{''.join(parts)}</figure>"


def _data_url(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
