"""Visualize the attention of a model's blocks in image and video files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances
from matplotlib.figure import Figure

from ...checkpoint.predictor import Predictor
from ...modeling.predictions import predicted_counts
from ...utils.plotting import save_figure
from ..influence.influence import Influence
from ..recording.query import AttentionQuery, queries_from_instances
from ..recording.recorder import AttentionRecorder
from .attention_figure import (
    OVERVIEW_LENGTH,
    attention_figure,
    attention_panel,
    detection_figure,
)
from .explorer import explorer_page
from .image_io import is_video, read_image_rgb, read_video, video_writer
from .influence_figure import grid_of, influence_figure
from .instance_overlay import overlay_instances
from .output_names import INFLUENCE_EXTENSION
from .overlay import draw_point, resize_longest_side

FRAME_LENGTH = 480  # pixels of the longer side of each panel of a video


class AttentionVisualizer:
    """Runs a model on images and draws the attention of its blocks.

    Queries are the centers of the detections, or fixed points.

    Args:
        cfg: detectron2 config of the model, with ``MODEL.WEIGHTS``.
        blocks: Parts of the names of the blocks to draw. Default: all blocks, except blocks in
            heads if ``points`` are given.
        points: Query points (x, y) in pixels of the original image, instead of detections.
        confidence_threshold: Minimum score of a detection.
        max_detections: Maximum number of detections, highest score first.
        num_arrows: Maximum number of arrows in a panel, to the keys of largest magnitude.
        color_by_class: Draw detections in the ``thing_colors`` of the dataset's metadata, if it
            has any, instead of in a different color each.
        influence: Draw what has influence on the detections of images, too, through the first of
            the blocks that is not in a head. It takes about a hundred runs of a part of the model.

    Raises:
        ValueError: If no block's name contains one of ``blocks``, or if ``influence`` is asked for
            with ``points``, or without a block outside of the heads.
    """

    def __init__(
        self,
        cfg: CfgNode,
        *,
        blocks: Optional[Sequence[str]] = None,
        points: Sequence[tuple[float, float]] = (),
        confidence_threshold: float = 0.5,
        max_detections: int = 6,
        num_arrows: int = 10,
        color_by_class: bool = False,
        influence: bool = False,
    ) -> None:
        self._predictor = Predictor(cfg)
        self._metadata = matching_metadata(cfg)
        self._recorder = AttentionRecorder(self._predictor.model)
        self._blocks = select_blocks(self._recorder.block_names, blocks)
        self._heads_included = bool(blocks) or not points
        self._points = list(points)
        self._confidence_threshold = confidence_threshold
        self._max_detections = max_detections
        self._num_arrows = num_arrows
        self._color_by_class = color_by_class
        self._influence_block = self._block_of_influence() if influence else None

    def _block_of_influence(self) -> str:
        """The block through which influence is computed."""
        if self._points:
            raise ValueError("Influence is of regions on detections: leave out the points.")
        heads = getattr(self._predictor.model, "roi_heads", None)
        in_heads = set() if heads is None else set(heads.modules())
        modules = dict(self._predictor.model.named_modules())
        for name in self._blocks:
            if modules[name] not in in_heads:
                return name
        raise ValueError("Influence is drawn for a block outside of the heads, which is none here.")

    def visualize(
        self, path: str, output_stem: str, *, formats: Sequence[str] = ("png",), html: bool = False
    ) -> list[str]:
        """Visualize one file: an image as a figure, a video as a video.

        Args:
            path: Image or video file.
            output_stem: Path of the output files without their extension.
            formats: File formats of the figure of an image, such as "png" and "pdf".
            html: Write an explorer page of an image too.

        Returns:
            Paths of the files written, which are replaced if they exist.

        Raises:
            OSError: If a file cannot be read or written.
            ValueError: If the file cannot be decoded, or a query point lies outside the image.
        """
        if is_video(path):
            self._write_video(path, f"{output_stem}.mp4")
            return [f"{output_stem}.mp4"]
        image = read_image_rgb(path)
        # The model gets what detectron2 reads in training, which differs for unusual files.
        instances = self._predict(read_image(path, "BGR"))
        figure = self._figure(image, instances)
        outputs = [f"{output_stem}.{extension}" for extension in formats]
        for output in outputs:
            save_figure(figure, output)
        losses = None
        if self._influence_block is not None:
            losses = self._influence(path, instances)
            outputs.append(f"{output_stem}.{INFLUENCE_EXTENSION}")
            save_figure(self._influence_figure(image, instances, losses), outputs[-1])
        if html:
            page = self._explorer_page(image, instances, losses, title=os.path.basename(path))
            outputs.append(f"{output_stem}.html")
            with open(outputs[-1], "w", encoding="utf-8") as file:
                file.write(page)
        return outputs

    def _predict(self, image: np.ndarray) -> Instances:
        """Record a call of the model for a BGR image, and select its detections."""
        with self._recorder:
            outputs = self._predictor(image)
        if "instances" not in outputs:
            return _no_instances(image)
        instances = outputs["instances"].to("cpu")
        instances = instances[instances.scores >= self._confidence_threshold]
        return instances[instances.scores.argsort(descending=True)[: self._max_detections]]

    def _queries(self, instances: Instances) -> list[AttentionQuery]:
        """The fixed points, or else the centers of the detections."""
        if not self._points:
            return queries_from_instances(instances, self._metadata.get("thing_classes"))
        return [
            AttentionQuery((x, y), f"{number} ({x:g}, {y:g})")
            for number, (x, y) in enumerate(self._points, start=1)
        ]

    def _recorded_blocks(self) -> list[str]:
        """The blocks to draw: those selected that ran in the recorded call."""
        names = [name for name in self._recorder.recorded_blocks if name in self._blocks]
        if self._heads_included:
            return names
        return [name for name in names if self._recorder.roi_boxes(name) is None]

    def _figure(self, image: np.ndarray, instances: Instances) -> Figure:
        blocks = self._recorded_blocks()
        if not self._points:
            return detection_figure(
                image,
                instances,
                self._recorder,
                metadata=self._metadata,
                blocks=blocks,
                max_detections=self._max_detections,
                num_arrows=self._num_arrows,
                color_by_class=self._color_by_class,
            )
        queries = self._queries(instances)
        return attention_figure(
            image,
            queries,
            self._recorder,
            overview=_point_overview(image, queries),
            blocks=blocks,
            num_arrows=self._num_arrows,
        )

    def _influence(self, path: str, instances: Instances) -> np.ndarray:
        """What the logit of each detection loses without each cell of a grid, (N, R, C)."""
        inputs = self._predictor.model_inputs(read_image(path, "BGR"))
        model, block = self._predictor.model, self._influence_block
        height, width = instances.image_size
        influence = Influence(model, inputs, instances, block=block)
        return influence.map(*grid_of(width, height)).logit

    def _influence_figure(
        self, image: np.ndarray, instances: Instances, losses: np.ndarray
    ) -> Figure:
        queries = self._queries(instances)
        overview = overlay_instances(
            resize_longest_side(image, OVERVIEW_LENGTH)[0],
            instances,
            [query.label for query in queries],
            metadata=self._metadata,
        )
        return influence_figure(
            image,
            queries,
            self._recorder,
            losses,
            overview=overview,
            block=self._influence_block,
            num_arrows=self._num_arrows,
        )

    def _explorer_page(
        self, image: np.ndarray, instances: Instances, losses: Optional[np.ndarray], title: str
    ) -> str:
        return explorer_page(
            image,
            self._queries(instances),
            self._recorder,
            title=title,
            blocks=self._recorded_blocks(),
            influence=None if losses is None else {self._influence_block: losses},
        )

    def _write_video(self, path: str, output: str) -> None:
        """Write each frame's detections, and its first query's attention map of each block."""
        frames, frame_rate = read_video(path)
        with video_writer(output, frame_rate) as write:
            for frame in frames:
                write(self._output_frame(frame))

    def _output_frame(self, frame: np.ndarray) -> np.ndarray:
        instances = self._predict(frame[:, :, ::-1])
        queries, recorded = self._queries(instances), self._recorded_blocks()
        resized = resize_longest_side(frame, FRAME_LENGTH)[0]
        names = self._metadata.get("thing_classes")
        labels = [query.label for query in queries_from_instances(instances, names)]
        panels = [overlay_instances(resized, instances, labels, metadata=self._metadata)]
        for block in self._blocks:
            # Without a query, or if the block did not run, the frame itself keeps the layout.
            drawn = queries and block in recorded
            panels.append(self._frame_panel(frame, block, queries[0]) if drawn else resized)
        return np.concatenate(panels, axis=1)

    def _frame_panel(self, frame: np.ndarray, block: str, query: AttentionQuery) -> np.ndarray:
        boxes = None if query.box is None else [query.box]
        attn_map = self._recorder.attention_maps(block, [query.point], roi_boxes=boxes)[0]
        top_keys = self._recorder.top_k(block, query.point, self._num_arrows, roi_box=query.box)
        return attention_panel(frame, attn_map, query, top_keys, target_length=FRAME_LENGTH)


def _point_overview(image: np.ndarray, queries: Sequence[AttentionQuery]) -> np.ndarray:
    """The resized image with numbered query points."""
    overview, factor = resize_longest_side(image, OVERVIEW_LENGTH)
    for query in queries:
        x, y = query.point
        overview = draw_point(overview, (x * factor, y * factor), query.label.split()[0])
    return overview


def _no_instances(image: np.ndarray) -> Instances:
    """Empty detections, for a model that is not a detector."""
    return Instances(
        image.shape[:2],
        pred_boxes=Boxes(torch.zeros(0, 4)),
        scores=torch.zeros(0),
        pred_classes=torch.zeros(0, dtype=torch.long),
    )


def matching_metadata(cfg: CfgNode) -> Metadata:
    """Metadata of a config's first dataset for testing, or else for training.

    Names of classes and keypoints are left out where the model has another number of them: they
    would be those of another model.
    """
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    metadata = MetadataCatalog.get(names[0]).as_dict() if names else {}
    for key, (_, count) in predicted_counts(cfg).items():
        for names in (key, "thing_colors") if key == "thing_classes" else (key,):
            if len(metadata.get(names) or ()) != count:
                metadata.pop(names, None)
    return Metadata(**metadata)


def select_blocks(names: Sequence[str], parts: Optional[Sequence[str]]) -> list[str]:
    """Select blocks by parts of their names.

    Args:
        names: Names of the blocks.
        parts: Strings of which a selected name contains at least one. Default: select all.

    Returns:
        The selected names, in their order.

    Raises:
        ValueError: If a part occurs in no name; the message lists the names.
    """
    for part in parts or ():
        if not any(part in name for name in names):
            raise ValueError(f"No block's name contains {part!r}; there are {', '.join(names)}.")
    return [name for name in names if not parts or any(part in name for part in parts)]
