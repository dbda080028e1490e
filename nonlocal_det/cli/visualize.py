"""Draw the attention maps of a model's non-local blocks for images and videos.

Without a config file it uses the model that the demo trained. Files that cannot be drawn are
skipped. Where the output folder has other files of the same names, outputs get a number.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Optional

from ..attention.figures.image_io import expand_inputs
from ..attention.figures.output_names import free_output_stems
from ..attention.figures.visualizer import AttentionVisualizer
from ..errors import exit_on_error, program, summarize_error
from ..utils.deprecation import RenamedOption
from ..utils.file_io import ensure_writable_dir
from ..utils.outputs import CommandOutputs
from . import program_name
from .model_args import add_model_arguments, setup_cfg


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("visualize"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="images, videos, folders, glob patterns")
    add("--format", nargs="+", default=["png"], choices=["png", "pdf"], help="figure formats")
    add("--html", action="store_true", help="also write an explorer page for each image")
    add(
        "--influence",
        action="store_true",
        help="also draw what has influence on each detection of an image, which takes longer",
    )
    add("--block", action="append", help="block to draw, or part of its name; repeatable")
    add(
        "--point",
        type=_point,
        action="append",
        metavar="X,Y",
        help="query point in pixels, instead of detections; repeatable",
    )
    _add_drawing_arguments(parser)
    return parser.parse_args(argv)


def _add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of detections and arrows, and their former names."""
    add = parser.add_argument
    threshold = add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="minimum detection score (default 0.5)",
    )
    detections = add(
        "--max-detections",
        type=int,
        default=6,
        help="maximum number of detections, highest score first (default 6)",
    )
    arrows = add(
        "--num-arrows",
        type=int,
        default=10,
        help="maximum number of arrows to the keys with the largest weights (default 10)",
    )
    by_class = add(
        "--color-by-class", action="store_true", help="draw detections in the colors of classes"
    )
    add("--score", action=RenamedOption, renamed=threshold)
    add("--count", action=RenamedOption, renamed=detections)
    add("--arrows", action=RenamedOption, renamed=arrows)
    add("--by-class", action=RenamedOption, renamed=by_class)


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y in pixels") from None
    return x, y


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Visualize every input file; the exit code is 1 if any was skipped."""
    args = parse_args(argv)
    outputs = CommandOutputs("visualize")
    drawing = {"formats": args.format, "html": args.html}
    with exit_on_error():
        ensure_writable_dir(args.output)
        paths = expand_inputs(args.input, skip=outputs.is_earlier_output)
        if not paths:
            raise ValueError(f"No images or videos are in {', '.join(args.input)}.")
        stems = free_output_stems(paths, args.output, outputs, **drawing, influence=args.influence)
        visualizer = AttentionVisualizer(
            setup_cfg(args),
            blocks=args.block,
            points=args.point or (),
            confidence_threshold=args.confidence_threshold,
            max_detections=args.max_detections,
            num_arrows=args.num_arrows,
            color_by_class=args.color_by_class,
            influence=args.influence,
        )
    exit_code = 0
    for path, stem in zip(paths, stems):
        try:
            with outputs.drafts(args.output) as drafts:
                written = visualizer.visualize(path, os.path.join(drafts, stem), **drawing)
            for draft in written:
                print(os.path.join(args.output, os.path.basename(draft)))
        except Exception as error:  # the other files are drawn, whatever is wrong with this one
            exit_code = 1
            known = isinstance(error, (ValueError, OSError))
            message = error if known else f"{path!r} cannot be drawn: {summarize_error(error)}."
            print(f"{program()}: skipped: {message}", file=sys.stderr)
    return exit_code
