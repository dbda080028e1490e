"""Saved figures: dollar signs of names, numbers of axes, files that are never half written.

Mutations tried by hand; each makes at least one test here fail: formulas in titles, legends or
annotations; no formulas on axes; a figure written in place.
"""

from __future__ import annotations

import os

import pytest
from matplotlib.figure import Figure

from nonlocal_det.utils.plotting import save_figure


def figure_of(name: str, scale: str = "linear") -> Figure:
    """A figure with a name wherever figures of this project have one."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([1, 10, 100], [1, 2, 3], label=name)
    axes.set(xscale=scale, title=name, xlabel=name)
    axes.annotate(name, (1, 1))
    axes.legend()
    figure.legend(*axes.get_legend_handles_labels())
    figure.text(0.5, 0.5, name)
    return figure


@pytest.mark.parametrize("name", ["a$\\frac$", "$", "US$ or CA$", "a_b^{c", "$\\alpha$"])
@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_names_may_hold_dollar_signs(name, ending, tmp_path):
    save_figure(figure_of(name), str(tmp_path / f"a.{ending}"))
    assert (tmp_path / f"a.{ending}").stat().st_size > 1000


def test_numbers_of_logarithmic_axes_stay_formulas(tmp_path):
    figure = figure_of("$x$", "log")
    save_figure(figure, str(tmp_path / "a.png"))
    axes = figure.axes[0]
    labels = [label for label in axes.get_xticklabels() if "mathdefault" in label.get_text()]
    assert labels and all(label.get_parse_math() for label in labels)
    assert not axes.title.get_parse_math()


def test_figures_appear_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    save_figure(figure_of("a"), str(path))
    before = path.read_bytes()

    def fail(file, **options):
        file.write(b"half")
        raise OSError("disk full")

    broken = figure_of("b")
    monkeypatch.setattr(broken, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(broken, str(path))
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.png"]
