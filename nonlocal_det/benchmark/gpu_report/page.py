"""The report as a page in Markdown, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional

from ...utils.markdown import markdown_table
from ..report import MIB

_FORMS = ("fast", "sdpa", "dense")
_ALONE = ("flash", "memory-efficient", "cuDNN", "dense")
_MAX_NAMES = 5

Row = dict[str, Any]
Cells = list[str]


def make_page(report: dict[str, Any]) -> str:
    """The page of a report of `make_report`."""
    sections = [_part(name, entry) for name, entry in report["parts"].items()]
    return (
        "\n\n".join(["# GPU report", _verdict(report), _machine(report["machine"]), *sections])
        + "\n"
    )


def _verdict(report: dict[str, Any]) -> str:
    """What the reader should know first."""
    sentences = []
    if report["device"] == "cpu":
        sentences.append(
            "There is no GPU here: this is the report's check of itself on the CPU, at small sizes."
        )
    entries = report["parts"].values()
    checked = sum("passed" in row for entry in entries for row in entry["rows"])
    failures = report["failures"]
    if failures:
        more = f" and {len(failures) - _MAX_NAMES} more" if len(failures) > _MAX_NAMES else ""
        names = "; ".join(failures[:_MAX_NAMES])
        sentences.append(f"**{len(failures)} of the checks failed:** {names}{more}.")
    elif not checked:
        sentences.append("No result was checked.")
    else:
        sentences.append(f"All {checked} checks of exactness that were made passed.")
    dense = [row["name"] for entry in entries for row in entry["rows"] if row.get("dense")]
    if dense:
        sentences.append(f"The softmax holds all attention weights with {'; '.join(dense)}.")
    return " ".join(sentences)


def _machine(machine: dict[str, Any]) -> str:
    texts = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in machine.items()}
    return markdown_table(["machine", ""], ([key, text] for key, text in texts.items())).rstrip()


def _part(name: str, entry: dict[str, Any]) -> str:
    """Heading, table, and the rows that have none of its numbers."""
    columns, cells_of, notes_of = _LAYOUTS[name]
    rows = entry["rows"]
    measured = [row for row in rows if not {"error", "skipped"} & row.keys()]
    texts = [f"## {entry['title']}", f"{len(measured)} of {len(rows)} rows, {entry['seconds']} s."]
    if measured:
        texts.append(
            markdown_table(columns, (cells for row in measured for cells in cells_of(row))).rstrip()
        )
    notes = [*notes_of(measured), *_missing(rows, "error"), *_missing(rows, "skipped")]
    return "\n\n".join([*texts, *(["\n".join(f"- {note}" for note in notes)] if notes else [])])


def _missing(rows: Iterable[Row], kind: str) -> list[str]:
    """One line for each reason why rows have an error or were skipped, with their names."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if kind in row:
            names.setdefault(row[kind], []).append(row["name"])
    return [f"{kind}: {'; '.join(of)}: {reason}" for reason, of in names.items()]


def _number(value: Optional[float], unit: float = 1.0, form: str = ".2f") -> str:
    return "–" if value is None else f"{value / unit:{form}}"


def _ms(seconds: Optional[float]) -> str:
    return _number(seconds, 1e-3)


def _mib(size: Optional[float]) -> str:
    return _number(size, MIB, ".0f")


def _ratio(over: Optional[float], under: Optional[float]) -> str:
    return "–" if over is None or not under else f"{over / under:.2f}"


def _kernel_cells(row: Row) -> list[Cells]:
    alone = [_ms(row["alone"].get(name, {}).get("seconds")) for name in _ALONE]
    weight = _number(row["bytes_per_weight"])
    return [[row["name"], row["taken"], _ms(row["seconds"]), _mib(row["bytes"]), weight, *alone]]


def _kernel_notes(rows: Sequence[Row]) -> list[str]:
    """The kernels behind each path, and why backends refuse."""
    kernels: dict[str, set[str]] = {}
    refusals: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        kernels.setdefault(row["taken"], set()).update(f"`{name}`" for name in row["kernels"])
        for name, result in row["alone"].items():
            if "refused" in result:
                refusals.setdefault((name, result["refused"]), []).append(row["name"])
    return [
        *(
            f"kernels of {path}: {', '.join(sorted(found))}"
            for path, found in kernels.items()
            if found
        ),
        *(f"{name} refuses {'; '.join(of)}: {why}" for (name, why), of in refusals.items()),
    ]


def _table_cells(row: Row) -> list[Cells]:
    seconds, sizes = (
        [row.get(f"{form}_{unit}") for form in _FORMS] for unit in ("seconds", "bytes")
    )
    case = row["name"]
    ratios = [_ratio(seconds[0], other) for other in seconds[1:]]
    return [[case, *map(_ms, seconds), *ratios, *map(_mib, sizes)]]


def _exactness_cells(row: Row) -> list[Cells]:
    verdict = "passed" if row["passed"] else "**failed**"
    return [[row["name"], row["tensor"], _error(row), _tolerance(row), verdict]]


def _activation_cells(row: Row) -> list[Cells]:
    verdict = "passed" if row["passed"] else "**failed**"
    error = _error(row) if row["compared"] or not row["finite"] else "beyond the range"
    finite = "yes" if row["finite"] else "**no**"
    return [[row["name"], finite, error, _tolerance(row), verdict]]


def _error(row: Row) -> str:
    return "not finite" if row["difference"] is None else _number(row["difference"], form=".1e")


def _tolerance(row: Row) -> str:
    return _number(row["tolerance"], form=".1e")


def _detector_cells(row: Row) -> list[Cells]:
    return [
        [
            f"{row['config']}, {row['name']}, {mode['mode']}",
            *(_ms(mode[f"{name}_seconds"]) for name in ("baseline", "blocks")),
            _number(mode["ratio"], form=".3f"),
            *(_mib(mode.get(f"{name}_bytes")) for name in ("baseline", "blocks")),
        ]
        for mode in row["modes"]
    ]


def _training_cells(row: Row) -> list[Cells]:
    return [
        [
            f"{name}, {row['iterations']} iterations, {row['dataset']}",
            *(_number(found[key], form=".1f") for key in ("AP", "AP50")),
            _number(found["seconds"], form=".0f"),
        ]
        for name, found in row["variants"].items()
    ]


def _no_notes(rows: Sequence[Row]) -> list[str]:
    return []


def _comparison_notes(rows: Sequence[Row]) -> list[str]:
    return ["errors and tolerances are relative to the largest number of the result"]


Layout = tuple[list[str], Callable[[Row], list[Cells]], Callable[[Sequence[Row]], list[str]]]
_LAYOUTS: dict[str, Layout] = {
    "kernels": (
        ["channels", "path", "ms", "MiB", "bytes per weight", *(f"{a} alone, ms" for a in _ALONE)],
        _kernel_cells,
        _kernel_notes,
    ),
    "tables": (
        [
            *("case", "ms", "SDPA, ms", "dense, ms", "of SDPA's time", "of the dense form's"),
            *("MiB", "SDPA, MiB", "dense, MiB"),
        ],
        _table_cells,
        _no_notes,
    ),
    "exactness": (
        ["block", "worst result", "error", "tolerance", ""],
        _exactness_cells,
        _comparison_notes,
    ),
    "detectors": (
        [
            *("detector", "without blocks, ms", "with blocks, ms", "ratio"),
            *("without, MiB", "with, MiB"),
        ],
        _detector_cells,
        _no_notes,
    ),
    "activations": (
        ["block", "finite", "error", "tolerance", ""],
        _activation_cells,
        _comparison_notes,
    ),
    "training": (
        ["training", "box AP", "box AP50", "seconds"],
        _training_cells,
        _no_notes,
    ),
}
