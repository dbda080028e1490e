"""Measure time and peak memory of the operators and blocks: the fast forms against dense ones.

    nonlocal-det benchmark
    nonlocal-det benchmark --target block --pairwise dot_product --shape 256x200x336
    nonlocal-det benchmark --config-file mask_rcnn_R50_NL
    nonlocal-det benchmark --gpu-report
    nonlocal-det benchmark --peers

"fast" is the package's implementation; "dense" holds the attention weights, multiplies, and leaves
the backward pass to autograd, as is usual. Each measurement is a process of its own. Fast and dense
alternate, and medians over the repetitions are reported. Logits have a standard deviation near 1,
which favors the dense form: unscaled, many weights are denormal numbers, with which a CPU is up to
70 times slower.

Peak memory is what a call adds to its inputs: on a CPU the resident set, on a GPU the allocations
of PyTorch. The floor is the time of the case's own matrix products at the best rate of matrix
products that was measured next to it; "convolutions" is the time of a block's own 1x1 convolutions.

With --peers, blocks of other packages take the place of the dense forms: see
`nonlocal_det.benchmark.peers`.

--gpu-report measures a fixed set of cases on the GPU instead: the kernels that run, time and
memory, exactness, a whole detector, and a short training. It writes gpu_report.json and
gpu_report.md, by default to output/gpu_report, and ends with exit code 1 if a result is wrong.
Without a GPU it checks itself on the CPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, Optional

import torch

from ..benchmark.cases import DTYPES, Case
from ..benchmark.detector import time_detector
from ..benchmark.measure import measure_forms
from ..benchmark.peer_comparison import measure_peer
from ..benchmark.peer_report import PEER_FILES, peer_table, write_peers
from ..benchmark.peers import GLOBAL_CONTEXT, PEERS, import_peers
from ..benchmark.report import FILES, machine_info, results_table, write_results
from ..errors import exit_on_error
from ..layers import PAIRWISE
from ..utils.deprecation import RenamedOption, warn_renamed
from ..utils.file_io import ensure_writable_dir
from ..utils.outputs import CommandOutputs
from . import program_name
from .gpu_report import GPU_OUTPUT, report_gpu

SHAPES = ((512, 100, 168), (1024, 50, 84))
MODES = ("inference", "training")


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog=program_name("benchmark"),
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_options(parser)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU; use --device cpu.")
    _check_gpu_report(parser, args)
    if args.pairwise is None:
        args.pairwise = (*PAIRWISE, GLOBAL_CONTEXT) if args.peers else PAIRWISE
    if not args.peers and GLOBAL_CONTEXT in args.pairwise:
        parser.error(f"--pairwise {GLOBAL_CONTEXT} is for --peers.")
    if args.peers and any(len(shape) != 3 for shape in args.shape):
        parser.error("--peers compares two-dimensional blocks; give --shape CxHxW.")
    return args


def _check_gpu_report(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that have no effect with or without --gpu-report."""
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if args.gpu_report:
        unused = [name for name in given if name not in ("gpu_report", "budget", "output")]
        if unused:
            option = unused[0].replace("_", "-")
            parser.error(f"--gpu-report measures a fixed set of cases; leave out --{option}.")
    elif "budget" in given:
        parser.error("--budget is the time of --gpu-report, which is missing.")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_case_options(parser)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to run on")
    repeats = add("--repeats", type=_positive, default=3, help="repetitions; medians are shown")
    add("--rounds", action=RenamedOption, renamed=repeats)
    add("--output", metavar="DIR", help="output directory of the JSON file, the plot and the table")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--peers",
        action="store_true",
        help="compare blocks with those of mmcv, timm and pytorchvideo that compute the same, with "
        "and without subsampling",
    )
    instead.add_argument(
        "--config-file",
        metavar="FILE",
        help="benchmark the detector of this config instead, with and without its blocks; a path, "
        "or a name of the model zoo",
    )
    instead.add_argument(
        "--gpu-report", action="store_true", help="report what the package does on a GPU"
    )
    add(
        "--size",
        type=_positive,
        nargs=2,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="image size in pixels, for --config-file",
    )
    add(
        "--budget",
        type=_positive,
        default=600,
        metavar="SECONDS",
        help="time for --gpu-report, which leaves out what no longer fits",
    )


def _add_case_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are combined to cases."""

    def add(name: str, *former: str, **options: Any) -> None:
        option = parser.add_argument(name, **options)
        for old in former:
            parser.add_argument(old, action=RenamedOption, renamed=option)

    add(
        "--target",
        "--what",
        nargs="+",
        type=_target,
        choices=("aggregation", "block"),
        default=["aggregation"],
        help="weighted sums alone, or whole blocks",
    )
    add(
        "--pairwise",
        nargs="+",
        choices=(*PAIRWISE, GLOBAL_CONTEXT),
        help=f"pairwise functions; {GLOBAL_CONTEXT}, the block of that name, is for --peers "
        "(default: all)",
    )
    add("--shape", nargs="+", type=_shape, default=SHAPES, metavar="CxHxW", help="input shapes")
    add("--mode", nargs="+", choices=MODES, default=MODES, help="training includes backward")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32"], help="tensor dtypes")
    add("--batch-size", "--batch", type=_positive, default=1, help="number of images")
    add("--threads", type=_positive, default=torch.get_num_threads(), help="number of CPU threads")
    add("--skip-dense", "--fast-only", action="store_true", help="do not run the dense forms")


def _target(text: str) -> str:
    if text == "sums":
        warn_renamed("--target sums", "--target aggregation")
        return "aggregation"
    return text


def _shape(text: str) -> tuple[int, ...]:
    """Read 512x100x168: channels, then one, two or three sizes."""
    sizes = text.split("x")
    if not 2 <= len(sizes) <= 4 or not all(s.isdigit() and int(s) > 0 for s in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape: give channels and one to three sizes, like 512x100x168."
        )
    return tuple(map(int, sizes))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1.")
    return int(text)


def make_cases(args: argparse.Namespace) -> list[Case]:
    """All combinations of the options."""
    return [
        Case(target, pairwise, shape, mode, dtype, args.device, args.batch_size, args.threads)
        for dtype, target, shape, pairwise, mode in product(
            args.dtype, args.target, args.shape, args.pairwise, args.mode
        )
    ]


def make_peer_cases(args: argparse.Namespace, peers: Iterable[str]) -> list[Case]:
    """All combinations of the options that these of the `PEERS` have."""
    fixed = (args.device, args.batch_size, args.threads)
    return [
        Case("block", function, shape, mode, dtype, *fixed, peer=name, subsample=subsample)
        for name in peers
        for dtype, function, shape, subsample, mode in product(
            args.dtype, PEERS[name].pairwise, args.shape, PEERS[name].subsample, args.mode
        )
        if function in args.pairwise
    ]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure, print and write the results."""
    args = parse_args(argv)
    if args.gpu_report:
        return report_gpu(args.output or GPU_OUTPUT, args.budget)
    outputs = CommandOutputs("benchmark")
    with exit_on_error(ValueError, OSError, RuntimeError):
        if args.output:
            ensure_writable_dir(args.output)
            files = PEER_FILES if args.peers else FILES
            outputs.check(*(os.path.join(args.output, name) for name in files))
        if args.peers:
            _benchmark_peers(args, outputs)
        elif args.config_file:
            _start(args)
            size = tuple(args.size)
            for line in time_detector(args.config_file, size, args.repeats, args.device):
                print(line, flush=True)
        else:
            _benchmark_forms(args, outputs)
    return 0


def _start(args: argparse.Namespace) -> dict[str, object]:
    """Print and return what is known of the machine."""
    machine = machine_info(args.device, args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    if args.device == "cpu" and machine["load"] > 0.5:
        print("Other programs are running: times, of the fast forms above all, are too long.")
    return machine


def _benchmark_forms(args: argparse.Namespace, outputs: CommandOutputs) -> None:
    """The fast forms against the dense ones."""
    machine = _start(args)
    rows = [
        measure_forms(case, args.repeats, args.skip_dense) for case in _announced(make_cases(args))
    ]
    print(results_table(rows))
    if args.output:
        with outputs.drafts(args.output) as drafts:
            write_results(drafts, machine, rows)
        print(f"Wrote {' and '.join(FILES)} to {args.output}.")


def _benchmark_peers(args: argparse.Namespace, outputs: CommandOutputs) -> None:
    """Our blocks beside those of other packages."""
    versions, missing = import_peers()
    if missing:
        print(missing)
    machine = _start(args)
    cases = make_peer_cases(args, versions)
    if not cases:
        raise ValueError(
            f"None of {', '.join(versions)} has {', '.join(args.pairwise)}; give another "
            f"--pairwise."
        )
    rows = [measure_peer(case, args.repeats) for case in _announced(cases)]
    print(peer_table(rows, versions))
    if args.output:
        with outputs.drafts(args.output) as drafts:
            write_peers(drafts, machine, rows, versions)
        print(f"Wrote {', '.join(PEER_FILES)} to {args.output}.")


def _announced(cases: Sequence[Case]) -> Iterator[Case]:
    """Yield the cases, and print each before it is measured."""
    for i, case in enumerate(cases, start=1):
        peer = f"{case.peer}, " if case.peer else ""
        print(f"{i} of {len(cases)}: {peer}{case.name}", flush=True)
        yield case
