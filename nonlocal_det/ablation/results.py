"""Result files, from which a suite resumes on any machine: JSON, one finished run per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from ..utils.file_io import atomic_write

Result = dict[str, Any]

LEARNED = 0.95  # share of the objects classified rightly in training, of a run that has learned


def read_results(file: str, keys: Iterable[str]) -> list[Result]:
    """Read the results of finished runs; none if the file does not exist.

    Args:
        file: Path of the file.
        keys: Keys that each result must have.

    Raises:
        ValueError: If a line is no result.
    """
    if not os.path.exists(file):
        return []
    results = []
    with open(file, encoding="utf-8") as opened:
        for number, line in enumerate(opened, start=1):
            try:
                results.append(json.loads(line))
                complete = set(keys) <= results[-1].keys()
            except (ValueError, AttributeError):
                complete = False
            if not complete:
                raise ValueError(f"Line {number} of {file!r} is not the result of a run.")
    return results


def write_results(file: str, results: Iterable[Result]) -> None:
    """Write results for `read_results`, all or nothing."""
    with atomic_write(file) as opened:
        opened.writelines(json.dumps(result) + "\n" for result in results)
