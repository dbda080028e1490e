"""Time and peak memory of a case in each form: ours, dense, and PyTorch's own attention."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ...errors import is_out_of_memory
from ...layers.non_local import SOFTMAX
from ..cases import Case, fits_in_memory, precision
from ..measure import measure_calls

_SECONDS = 0.2  # of timing, for each form


def measure_table_row(case: Case) -> dict[str, Any]:
    """Measure all forms of a case.

    Returns:
        ``case`` and, for each of the forms "fast", "dense" and, with a softmax, "sdpa" that fits in
        memory, ``<form>_seconds`` and ``<form>_bytes``.
    """
    forms = ("fast", "sdpa", "dense") if case.pairwise in SOFTMAX else ("fast", "dense")
    row: dict[str, Any] = {"case": asdict(case)}
    torch.cuda.empty_cache()  # memory that is kept for reuse would count as taken
    for form in forms:
        if form == "dense" and not fits_in_memory(case):
            continue
        try:
            with precision(case.dtype):
                measured = measure_calls(replace(case, form=form), _SECONDS)
        except RuntimeError as error:
            if form == "fast" or not is_out_of_memory(error):
                raise
            continue
        row.update({f"{form}_{quantity}": value for quantity, value in measured.items()})
    return row
