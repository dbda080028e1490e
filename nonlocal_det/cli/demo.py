"""Train two small Mask R-CNNs, without and with a non-local block, and compare what they see.

    nonlocal-det demo

Both train from scratch, side by side, on wide synthetic images (unlit_long), on the CPU, and take
some minutes. It ends with a table and with a page, index.html in the output directory. A demo that
was stopped continues; a finished one is evaluated and drawn again. Options at the end, KEY VALUE,
override the config of both models.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from detectron2.config import CfgNode

from ..benchmark.report import processor_name
from ..config import load_config
from ..demo.comparison import (
    EXPLORERS,
    WITH,
    WITHOUT,
    Comparison,
    compare,
    validation_images,
)
from ..demo.page import Row, demo_page, number
from ..demo.side_by_side import Model, train_models, two_models
from ..demo.strips import comparison_figure
from ..engine.training_process import num_cores
from ..errors import exit_on_error
from ..utils.file_io import ensure_writable_dir
from ..utils.outputs import CommandOutputs
from ..utils.plotting import save_figure
from . import program_name

CONFIG = "demo_mask_rcnn_R18_C3_NL"
OUTPUT = os.path.join("output", "demo")
PAGE, FIGURE = "index.html", "comparison.png"
NUM_FIGURE_VIEWS = 3
NEXT_COMMAND = "python tools/visualize_attention.py --html --output output/mine --input IMAGE"


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(
        prog=program_name("demo"), description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--config-file", default=CONFIG, help=f"config of the model with a block ({CONFIG})")
    add("--output", default=OUTPUT, metavar="DIR", help=f"output directory (default: {OUTPUT})")
    add("opts", nargs=argparse.REMAINDER, help="config options at the end: KEY VALUE ...")
    return parser.parse_args(argv)


def train(models: Sequence[Model], cfg: CfgNode, config_file: str) -> None:
    """Train both models, at the same time if there is a core for each."""
    at_once = num_cores() > 1
    how = "side by side" if at_once else "one after the other, as there is one CPU core"
    print(f"Training two Mask R-CNNs from scratch, {how}. In training, classified correctly:\n")
    try:
        with exit_on_error(RuntimeError, OSError):
            train_models(models, config_file, at_once=at_once, max_iter=cfg.SOLVER.MAX_ITER)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues from the last checkpoints.")
        sys.exit(130)


def print_table(rows: Sequence[Row], reach: float) -> None:
    """Print what both models reach."""
    print(f"\n  {'':16}{f'lamp nearer than {reach:.0f} px':^28}{f'lamp beyond {reach:.0f} px':^28}")
    print(f"  {'':16}" + f"{'box AP':>9}{'mask AP':>9}{'correct':>9} " * 2)
    for row in rows:
        cells = [f"{number(value):>9}" for value in (*row.near, *row.far)]
        print(f"  {row.name:16}{''.join(cells[:3])} {''.join(cells[3:])}")
    print(
        "\n  AP as of COCO, of the shapes with a lamp at that distance. Correct: percentage of "
        "them\n  whose most confident detection is of their class; guessing the color would get 33."
    )


def attention_sentence(found: Comparison, reach: float) -> str:
    """How often the block attends to the lamp."""
    return (
        f"Of the {found.correct} shapes beyond {reach:.0f} pixels that the model with a block "
        f"classifies correctly, {found.on_cue} have their largest attention weight on the lamp or "
        f"its glow."
    )


def make_page(found: Comparison, reach: float) -> str:
    """The page, HTML."""
    return demo_page(
        found.rows,
        found.views,
        reach=reach,
        lead=(
            "The class of every shape in these images is the color of the image's lamp, or "
            "“unlit” where there is none; its own pixels say nothing about it. Two Mask R-CNNs "
            "were trained on the same images, with the same seed. What the stock one knows of a "
            f"shape ends {reach:.0f} pixels from it. The other one has a single non-local block, "
            "through which each position of the image can take up information from any other."
        ),
        result=attention_sentence(found, reach),
        command=NEXT_COMMAND,
        machine=f"Trained on {processor_name()}, torch {torch.__version__}.",
    )


def write_outputs(found: Comparison, reach: float, folder: str) -> None:
    """Write the page, the explorer pages that it leads to, and the figure."""
    outputs = CommandOutputs("demo")
    with outputs.drafts(os.path.join(folder, EXPLORERS)) as drafts:
        for name, page in found.explorers.items():
            Path(drafts, name).write_text(page, encoding="utf-8")
    strips = [view.strips for view in found.views[:NUM_FIGURE_VIEWS]]
    figure = comparison_figure(strips, [row.name for row in found.rows])
    with outputs.drafts(folder) as drafts:
        save_figure(figure, os.path.join(drafts, FIGURE))
        Path(drafts, PAGE).write_text(make_page(found, reach), encoding="utf-8")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, compare, and say where the page is."""
    args = parse_args(argv)
    torch.set_num_threads(1)  # sums have one order: the same figures with any number of cores
    models = two_models(args.output, args.opts)
    page, figure = (os.path.join(args.output, name) for name in (PAGE, FIGURE))
    with exit_on_error():
        cfg = load_config(args.config_file, args.opts)
        ensure_writable_dir(args.output)
        CommandOutputs("demo").check(page, figure)
        print(f"Generating {', '.join(cfg.DATASETS.TRAIN)} ...", flush=True)
        images = validation_images(load_config(args.config_file, models[WITHOUT].options))
    train(models, cfg, args.config_file)
    with exit_on_error():
        cfg.MODEL.WEIGHTS = models[WITH].weights
        found = compare(images, models, cfg)
        print_table(found.rows, images.reach)
        print(f"\n  {attention_sentence(found, images.reach)}")
        write_outputs(found, images.reach, args.output)
    print(f"\nOpen the page in a browser: {Path(page).resolve().as_uri()}")
    print(f"The same as one image: {figure}")
    print(f"To go on with an image of your own: {NEXT_COMMAND}")
    return 0
