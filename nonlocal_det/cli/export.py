r"""Export a detector to TorchScript or ONNX, and compare the file's results with the model's.

    nonlocal-det export --config-file mask_rcnn_R50_NL --format onnx --sample-image image.jpg \
        --output output/export MODEL.WEIGHTS output/model_final.pth

The options are those of detectron2's tools/deploy/export_model.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Optional

from detectron2.utils.logger import setup_logger

from ..errors import exit_on_error
from ..export import FORMATS, METHODS, export_and_compare
from . import program_name


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse detectron2's options."""
    parser = argparse.ArgumentParser(
        prog=program_name("export"), description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add(
        "--config-file",
        required=True,
        metavar="FILE",
        help="YAML config; a path, or a name of the model zoo",
    )
    add("--format", choices=tuple(FORMATS), default="torchscript", help="file format")
    add("--export-method", choices=METHODS, default="tracing", help="ONNX: tracing only")
    add(
        "--sample-image",
        metavar="FILE",
        help="image to trace with (default: the first of DATASETS.TEST)",
    )
    add("--output", required=True, metavar="DIR", help="output directory")
    add("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Export, and print what was written and compared."""
    args = parse_args(argv)
    setup_logger()
    with exit_on_error():
        for line in export_and_compare(
            args.config_file,
            args.opts,
            args.output,
            file_format=args.format,
            method=args.export_method,
            sample_image=args.sample_image,
        ):
            print(line, flush=True)
    return 0
