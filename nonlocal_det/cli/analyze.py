"""Count the parameters and FLOPs that the blocks of a config add to its detector, block by block.

nonlocal-det analyze --config-file mask_rcnn_R50_NL

With an image, also measure the attention with which the blocks start to train.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from typing import Optional

from ..benchmark.flops import analysis_table, analyze, build_for_analysis
from ..benchmark.initial_attention import (
    attention_json,
    attention_table,
    initial_attention,
    initial_weights,
)
from ..errors import exit_on_error
from ..utils.deprecation import RenamedOption
from ..utils.file_io import ensure_writable_dir
from ..utils.outputs import CommandOutputs
from . import program_name


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog=program_name("analyze"), description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add(
        "--config-file",
        required=True,
        metavar="FILE",
        help="YAML config or LazyConfig; a path, or a name of the model zoo",
    )
    add(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="image size in pixels (default: 800 1333)",
    )
    add(
        "--image",
        metavar="FILE",
        help="measure the attention on this image, resized into --size: with the weights that the "
        "config trains from if they are a local file, otherwise with random ones",
    )
    output_json = add("--output-json", metavar="FILE", help="write the counts to this JSON file")
    add("--json", action=RenamedOption, renamed=output_json)
    add("opts", nargs="*", help="config overrides: KEY VALUE for YAML, KEY=VALUE for a LazyConfig")
    args = parser.parse_args(argv)
    if min(args.size) < 1:
        parser.error(f"--size {args.size[0]} {args.size[1]}: both must be at least 1.")
    if args.image and not os.path.isfile(args.image):
        parser.error(f"--image {args.image}: there is no such file.")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Count, print and write the counts."""
    args = parse_args(argv)
    outputs = CommandOutputs("analyze")
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with exit_on_error():
        if args.output_json:
            ensure_writable_dir(os.path.dirname(args.output_json) or ".", "--output-json")
            outputs.check(args.output_json)
        weights = initial_weights(args.config_file, args.opts) if args.image else ""
        model = build_for_analysis(args.config_file, args.opts)
        found = analyze(model, tuple(args.size))
        print(f"{args.config_file}, {args.size[0]} x {args.size[1]} pixels (height x width)")
        print(analysis_table(found))
        if args.image:
            attention = initial_attention(model, weights, args.image, tuple(args.size))
            print(f"\nAttention on {args.image}, with {weights or 'random weights'}")
            print(attention_table(attention))
            found["attention"] = attention_json(attention)
        if args.output_json:
            folder, name = os.path.split(args.output_json)
            with outputs.drafts(folder) as drafts:
                with open(os.path.join(drafts, name), "w", encoding="utf-8") as file:
                    json.dump({"config": args.config_file, **found}, file, indent=2)
    return 0
