"""The tutorial notebook runs from a bare folder, and its outputs are in the file.

    python tests/test_tutorial.py

runs it and writes the new outputs into ``docs/tutorial.ipynb``.

Mutations tried by hand; each makes at least one test here fail: a cell that raises, a figure that
is not drawn, the outputs of a cell removed from the file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def execute(folder: str) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in an empty folder with this Python and package."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": os.path.join(folder, "datasets"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }
    client = NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": folder}}, record_timing=False
    )
    return client.execute(env=environment)


def kinds_of_outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """For each cell of code, the kinds of its outputs: text, image/png."""
    return [
        [
            "image/png" if "image/png" in output.get("data", {}) else "text"
            for output in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _kind(output: nbformat.NotebookNode) -> str:
    return "image/png" if "image/png" in output.get("data", {}) else "text"


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that a notebook's cells print."""
    outputs = [out for cell in notebook.cells if "outputs" in cell for out in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def test_the_file_has_its_outputs() -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in kinds for kinds in kinds_of_outputs(notebook)) == 3
    assert "AP50" in printed(notebook) and "attention near the lamp" in printed(notebook)
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    before = nbformat.read(NOTEBOOK, as_version=4)
    after = execute(str(tmp_path))
    assert kinds_of_outputs(after) == kinds_of_outputs(before)
    # A block that starts as the identity, and an error that lists the positions.
    assert "True" in printed(after) and "res4" in printed(after)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        nbformat.write(execute(scratch), NOTEBOOK)
    print(f"Wrote {os.path.relpath(NOTEBOOK)}.", file=sys.stderr)
