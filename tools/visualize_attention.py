#!/usr/bin/env python
"""Draw what the non-local blocks of a model look at, for pictures, folders, patterns and videos.

    python tools/visualize_attention.py --input photo.jpg "holiday/*.jpg" --output seen
    python tools/visualize_attention.py --config-file configs/mask_rcnn_R50_NL.yaml \
        --weights model_final.pth --input photo.jpg --point 320,200 --html

Without a configuration it takes the model that ``tools/demo.py`` trained.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from matplotlib.figure import Figure

from nonlocal_det.attention import (
    AttentionQuery,
    AttentionRecorder,
    attention_figure,
    attention_panel,
    detection_figure,
    draw_point,
    explorer_page,
    overlay_instances,
    queries_from_instances,
    resize_longest_side,
)
from nonlocal_det.attention.image_io import (
    expand_inputs,
    is_video,
    read_image_rgb,
    read_video,
    video_writer,
)
from nonlocal_det.cli.model_args import add_model_arguments, setup_cfg
from nonlocal_det.errors import exit_on_error
from nonlocal_det.utils.file_io import ensure_writable_dir
from nonlocal_det.utils.plotting import save_figure

FRAME = 480  # pixels of the longer side of each panel of a video


def parse_args(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="images, folders, patterns, videos")
    add("--score", type=float, default=0.5, help="least score of a detection (default 0.5)")
    add("--count", type=int, default=6, help="detections drawn, the most certain first (default 6)")
    add(
        "--point",
        type=_point,
        action="append",
        metavar="X,Y",
        help="a pixel to ask instead of detections; may be given several times",
    )
    add("--block", action="append", help="a block's name or a part of it; by default all blocks")
    add("--arrows", type=int, default=10, help="arrows to the strongest positions (default 10)")
    add("--format", nargs="+", default=["png"], choices=["png", "pdf"], help="of the figures")
    add("--by-class", action="store_true", help="detections in the colors of their classes")
    add("--html", action="store_true", help="also write a page to explore for each picture")
    return parser.parse_args(arguments)


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y in pixels") from None
    return x, y


def choose_blocks(names: Sequence[str], wanted: Optional[Sequence[str]]) -> list[str]:
    """The names that contain any of ``wanted``, or all.

    Raises:
        ValueError: if a wanted one is in no name.
    """
    for part in wanted or ():
        if not any(part in name for name in names):
            raise ValueError(f"No block's name contains {part!r}; there are {', '.join(names)}.")
    return [name for name in names if not wanted or any(part in name for part in wanted)]


class Viewer:
    """Runs a model on pictures and draws what its blocks looked at."""

    def __init__(self, cfg: CfgNode, args: argparse.Namespace) -> None:
        self._args = args
        self._predictor = DefaultPredictor(cfg)
        dataset = next(iter(cfg.DATASETS.TEST), "__none__")
        self._metadata = MetadataCatalog.get(dataset)
        self._recorder = AttentionRecorder(self._predictor.model)
        self._blocks = choose_blocks(self._recorder.blocks, args.block)

    def view(self, path: str, target: str) -> list[str]:
        """Draw one file; ``target`` is a path without ending. The paths written."""
        if is_video(path):
            return self._view_video(path, target + ".mp4")
        image = read_image_rgb(path)
        instances = self._detect(image)
        figure = self._figure(image, instances)
        paths = [f"{target}.{ending}" for ending in self._args.format]
        for written in paths:
            save_figure(figure, written)
        if self._args.html:
            looks = self._looks(instances)
            page = explorer_page(
                image, looks, self._recorder, title=os.path.basename(path), blocks=self._seen()
            )
            paths.append(target + ".html")
            with open(paths[-1], "w", encoding="utf-8") as file:
                file.write(page)
        return paths

    def _detect(self, image: np.ndarray) -> Instances:
        """Record the model's call, and give the detections that are certain enough."""
        with self._recorder:
            found = self._predictor(image[:, :, ::-1])
        instances = found["instances"].to("cpu") if "instances" in found else _nothing(image)
        instances = instances[instances.scores >= self._args.score]
        return instances[instances.scores.argsort(descending=True)[: self._args.count]]

    def _looks(self, instances: Instances) -> list[AttentionQuery]:
        if self._args.point:
            return [
                AttentionQuery(p, f"{n} ({p[0]:g}, {p[1]:g})")
                for n, p in enumerate(self._args.point, 1)
            ]
        return queries_from_instances(instances, self._metadata.get("thing_classes"))

    def _seen(self) -> list[str]:
        """The blocks to draw: a block in a head sees detections, and a point only when asked to."""
        seen = [name for name in self._recorder.recorded if name in self._blocks]
        if self._args.point and not self._args.block:
            return [name for name in seen if self._recorder.regions(name) is None]
        return seen

    def _figure(self, image: np.ndarray, instances: Instances) -> Figure:
        options = {"blocks": self._seen(), "arrows": self._args.arrows}
        if not self._args.point:
            return detection_figure(
                image,
                instances,
                self._recorder,
                metadata=self._metadata,
                count=self._args.count,
                by_class=self._args.by_class,
                **options,
            )
        overview, factor = resize_longest_side(image, 600)
        looks = self._looks(instances)
        for look in looks:
            x, y = look.point
            overview = draw_point(overview, (x * factor, y * factor), look.label.split()[0])
        return attention_figure(image, looks, self._recorder, overview=overview, **options)

    def _view_video(self, path: str, target: str) -> list[str]:
        """Frame by frame: the detections, and what the first place looks at in each block."""
        frames, rate = read_video(path)
        with video_writer(target, rate) as write:
            for frame in frames:
                write(self._strip(frame))
        return [target]

    def _strip(self, frame: np.ndarray) -> np.ndarray:
        instances = self._detect(frame)
        looks = self._looks(instances)
        picture = resize_longest_side(frame, FRAME)[0]
        labels = [
            look.label
            for look in queries_from_instances(instances, self._metadata.get("thing_classes"))
        ]
        parts = [overlay_instances(picture, instances, labels, metadata=self._metadata)]
        for block in self._blocks:
            # Without a place, or where the call did not reach the block, the frame stays as it is.
            part = picture
            if looks and block in self._seen():
                part = self._frame_panel(frame, block, looks[0])
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def _frame_panel(self, frame: np.ndarray, block: str, look: AttentionQuery) -> np.ndarray:
        boxes = None if look.box is None else [look.box]
        heat = self._recorder.attention_maps(block, [look.point], boxes=boxes)[0]
        targets = self._recorder.strongest(block, look.point, self._args.arrows, box=look.box)
        return attention_panel(frame, heat, look, targets, longest=FRAME)


def _nothing(image: np.ndarray) -> Instances:
    """No detections, from a model that does not detect."""
    return Instances(
        image.shape[:2],
        pred_boxes=Boxes(torch.zeros(0, 4)),
        scores=torch.zeros(0),
        pred_classes=torch.zeros(0, dtype=torch.long),
    )


def free_targets(paths: Sequence[str], folder: str) -> list[str]:
    """For each path one of its own in ``folder``, without ending: files may share a name."""
    taken: set[str] = set()
    targets = []
    for path in paths:
        stem, number = os.path.splitext(os.path.basename(path))[0], 2
        name = stem
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        targets.append(os.path.join(folder, name))
    return targets


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Draw every file; the number of those that could not be."""
    args = parse_args(arguments)
    with exit_on_error():
        ensure_writable_dir(args.output)
        paths = expand_inputs(args.input)
        if not paths:
            raise ValueError(f"No images or videos are in {', '.join(args.input)}.")
        viewer = Viewer(setup_cfg(args), args)
    failed = 0
    for path, target in zip(paths, free_targets(paths, args.output)):
        try:
            for written in viewer.view(path, target):
                print(written)
        except (ValueError, OSError) as error:
            failed += 1
            print(f"{os.path.basename(sys.argv[0])}: left out: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
