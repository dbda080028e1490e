"""Train two small Mask R-CNNs, without and with a non-local block, and compare what they see.

    nonlocal-det demo

Both train from scratch, side by side, on wide synthetic images (lamps_long), on the CPU, and take
some minutes. It ends with a table and with a page, index.html in the output directory. A demo that
was stopped continues; a finished one is evaluated and drawn again. Options at the end, KEY VALUE,
override the config of both models.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..ablation.receptive_field import cue_reach
from ..benchmark.report import processor_name
from ..checkpoint.predictor import Predictor
from ..config import load_config
from ..data.lamps.writer import read_params
from ..demo.attending import Attending
from ..demo.outcome import (
    Scene,
    attention_on_cue,
    box_ap_by_distance,
    chosen_scenes,
    read_detections,
    read_scenes,
    scores,
    share_right,
)
from ..demo.page import Row, View, demo_page, number
from ..demo.side_by_side import Model, train_models, two_models
from ..demo.strips import comparison_figure, draw_scene
from ..engine.training_process import num_cores
from ..errors import exit_on_error
from ..utils.file_io import atomic_write, ensure_writable_dir
from ..utils.outputs import CommandOutputs
from ..utils.plotting import save_figure
from . import program_name

CONFIG = "demo_mask_rcnn_R18_C3_NL"
OUTPUT = os.path.join("output", "demo")
NUM_SCENES = 6
NUM_FIGURE_SCENES = 3
WITHOUT, WITH = 0, 1  # indices of the models
MIN_COUNT = 20  # shapes that a point of the plot stands for, at least
PAGE, FIGURE, EXPLORERS = "index.html", "comparison.png", "explorer"
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


@dataclass(frozen=True)
class Data:
    """The validation images.

    Attributes:
        json_file: Their annotations.
        image_root: Their folder.
        class_names: Names of the classes.
        colors: RGB color of each class.
        reach: Distance from which on a lamp is outside the stock model's receptive field, pixels.
    """

    json_file: str
    image_root: str
    class_names: list[str]
    colors: list[tuple[int, int, int]]
    reach: float


def prepare(cfg: CfgNode, without: Model, config_file: str) -> Data:
    """Generate the images, and find how far the stock model sees."""
    name = cfg.DATASETS.TEST[0]
    DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    json_file = PathManager.get_local_path(metadata.json_file)
    params = read_params(json_file)
    read_scenes(json_file, (), params)
    stock = load_config(config_file, without.options)
    return Data(
        json_file,
        metadata.image_root,
        list(metadata.thing_classes),
        [tuple(color) for color in metadata.thing_colors],
        cue_reach(stock, params.glow_radius),
    )


def make_row(data: Data, model: Model, scenes: Sequence[Scene], index: int) -> Row:
    """A model's row of the table, and its curve."""
    detections = read_detections(model.detections)
    aps = scores(data.json_file, detections, data.reach)
    distances = [shape.distance for scene in scenes for shape in scene.shapes]
    longest = max(d for d in distances if not math.isnan(d))
    near, far = (
        (*(aps[kind][i]["AP"] for kind in ("box", "mask")), 100 * share)
        for i, share in enumerate(
            share_right(scenes, index, *ends) for ends in ((0, data.reach), (data.reach,))
        )
    )
    by_distance = box_ap_by_distance(data.json_file, detections, longest)
    curve = [
        ((r["low"] + r["high"]) / 2, r["AP50"]) for r in by_distance if r["count"] >= MIN_COUNT
    ]
    return Row(model.name, near, far, curve)


def print_table(rows: Sequence[Row], data: Data) -> None:
    """Print what both models reach."""
    limit = f"{data.reach:.0f} px"
    print(f"\n  {'':16}{f'lamp nearer than {limit}':^28}{f'lamp beyond {limit}':^28}")
    print(f"  {'':16}" + f"{'box AP':>9}{'mask AP':>9}{'right':>9} " * 2)
    for row in rows:
        cells = [f"{number(value):>9}" for value in (*row.near, *row.far)]
        print(f"  {row.name:16}{''.join(cells[:3])} {''.join(cells[3:])}")
    print(
        "\n  AP as of COCO, of the shapes with a lamp at that distance; right: percentage of them "
        "whose\n  most confident detection is of their class. Guessing a lamp's color would get 33."
    )


def make_views(
    data: Data, scenes: Sequence[Scene], attending: Attending, folder: str, outputs: CommandOutputs
) -> list[View]:
    """Draw images as both models see them, and write their explorer pages."""
    views = []
    with outputs.drafts(os.path.join(folder, EXPLORERS)) as drafts:
        for scene in scenes:
            image = attending.image(scene)
            attended = {
                "attn_map": attending.mean_map(scene),
                "top_keys": attending.top_keys([scene])[scene.image_id],
            }
            name = f"{Path(scene.file_name).stem}.html"
            with atomic_write(os.path.join(drafts, name)) as file:
                file.write(attending.explorer(scene))
            views.append(
                View(
                    scene.file_name,
                    (
                        draw_scene(image, scene, WITHOUT, data.colors),
                        draw_scene(image, scene, WITH, data.colors, **attended),
                    ),
                    tuple(sum(s.is_right(m) for s in scene.shapes) for m in (WITHOUT, WITH)),
                    len(scene.shapes),
                    f"{EXPLORERS}/{name}",
                )
            )
    return views


def write_page(
    data: Data, rows: Sequence[Row], views: Sequence[View], args: argparse.Namespace, said: str
) -> list[str]:
    """Write the page and the figure; returns their paths."""
    figure = comparison_figure(
        [v.strips for v in views[:NUM_FIGURE_SCENES]], [r.name for r in rows]
    )
    page = demo_page(
        rows,
        views,
        reach=data.reach,
        lead=(
            "The class of every shape in these images is the color of the image's lamp, or "
            "“unlit” where there is none; its own pixels say nothing about it. Two Mask R-CNNs "
            "were trained on the same images, with the same seed. What the stock one knows of a "
            f"shape ends {data.reach:.0f} pixels from it. The other one has a single non-local "
            "block, through which each position of the image can take up information from any "
            "other."
        ),
        result=said,
        command=NEXT_COMMAND,
        machine=f"Trained on {processor_name()}, torch {torch.__version__}.",
    )
    outputs = CommandOutputs("demo")
    with outputs.drafts(args.output) as drafts:
        save_figure(figure, os.path.join(drafts, FIGURE))
        with atomic_write(os.path.join(drafts, PAGE)) as file:
            file.write(page)
    return [os.path.join(args.output, name) for name in (PAGE, FIGURE)]


def train(models: Sequence[Model], cfg: CfgNode, config_file: str) -> None:
    """Train both models, at the same time if there is a core for each."""
    at_once = num_cores() > 1
    how = "side by side" if at_once else "one after the other, as there is one CPU core"
    print(f"Training two Mask R-CNNs from scratch, {how}. In training, classified rightly:\n")
    with exit_on_error(RuntimeError, OSError):
        train_models(models, config_file, at_once=at_once, max_iter=cfg.SOLVER.MAX_ITER)


def compare(args: argparse.Namespace, data: Data, models: Sequence[Model]) -> list[str]:
    """Compare what trained models left: print the table, write the page; returns the paths."""
    detections = [read_detections(model.detections) for model in models]
    scenes = read_scenes(data.json_file, detections, read_params(data.json_file))
    rows = [make_row(data, model, scenes, index) for index, model in enumerate(models)]
    print_table(rows, data)
    cfg = load_config(args.config_file, [*args.opts, "MODEL.WEIGHTS", models[WITH].weights])
    attending = Attending(Predictor(cfg), data.image_root, WITH, data.class_names)
    hits, count = attention_on_cue(scenes, attending.top_keys(scenes), data.reach, WITH)
    said = (
        f"Of the {count} shapes beyond {data.reach:.0f} pixels that it classifies rightly, {hits} "
        f"have their largest attention weight on the lamp or its glow."
    )
    print(f"\n  {said}")
    shown = chosen_scenes(scenes, NUM_SCENES, data.reach)
    views = make_views(data, shown, attending, args.output, CommandOutputs("demo"))
    return write_page(data, rows, views, args, said)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, compare, and say where the page is."""
    args = parse_args(argv)
    torch.set_num_threads(1)  # sums have one order: the same figures with any number of cores
    with exit_on_error():
        cfg = load_config(args.config_file, args.opts)
        models = two_models(args.output, args.opts)
        ensure_writable_dir(args.output)
        CommandOutputs("demo").check(*(os.path.join(args.output, n) for n in (PAGE, FIGURE)))
        print(f"Generating {', '.join(cfg.DATASETS.TRAIN)} ...", flush=True)
        data = prepare(cfg, models[WITHOUT], args.config_file)
    train(models, cfg, args.config_file)
    with exit_on_error():
        page, figure = compare(args, data, models)
    print(f"\nOpen the page in a browser: {Path(page).resolve().as_uri()}")
    print(f"The same as one image: {figure}")
    print(f"To go on with an image of your own: {NEXT_COMMAND}")
    return 0
