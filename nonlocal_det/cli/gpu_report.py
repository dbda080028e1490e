"""``nonlocal-det benchmark --gpu-report``: runs, keeps and sums up the report on a GPU."""

from __future__ import annotations

import os
from functools import partial

import torch

from ..benchmark.gpu_report import run as gpu_report
from ..errors import exit_on_error
from ..utils.file_io import ensure_writable_dir
from ..utils.outputs import CommandOutputs

GPU_OUTPUT = os.path.join("output", "gpu_report")


def report_gpu(folder: str, budget: float) -> int:
    """Write the report on the GPU, part by part; 1 if a result is wrong, 130 if interrupted."""
    outputs = CommandOutputs("benchmark")

    def keep(report: gpu_report.Report) -> None:
        with outputs.drafts(folder) as drafts:
            gpu_report.write_report(report, drafts)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("There is no GPU here: the report checks itself on the CPU, at small sizes.")
    page = os.path.join(folder, gpu_report.FILES[1])
    try:
        with exit_on_error(OSError):
            ensure_writable_dir(folder)
            outputs.check(*(os.path.join(folder, name) for name in gpu_report.FILES))
            report = gpu_report.make_report(
                device,
                budget,
                keep=keep,
                run=gpu_report.run_in_processes,
                show=partial(print, flush=True),
            )
    except KeyboardInterrupt:
        print(f"\nInterrupted: {page} has what was measured.")
        return 130
    for failure in report["failures"]:
        print(f"FAILED: {failure}")
    print(f"Wrote {page}, and the same as {gpu_report.FILES[0]}.")
    return 1 if report["failures"] else 0
