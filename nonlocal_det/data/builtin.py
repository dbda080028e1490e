"""Registration of the lamps datasets in detectron2, each with splits ``_train`` and ``_val``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathHandler, PathManager

from .lamps.paint import LAMP_COLORS
from .lamps.params import LampsParams
from .lamps.writer import SPLITS, annotation_file, ensure_dataset, image_root


@dataclass(frozen=True)
class LampsDataset:
    """One of the datasets.

    Attributes:
        params: Parameters of the images.
        splits: Number of images of each split.
    """

    params: LampsParams = field(default_factory=LampsParams)
    splits: Mapping[str, int] = field(default_factory=lambda: SPLITS)


# Wide images, where a lamp may be outside the receptive field of a detector without blocks.
_LONG = LampsParams(
    side=(64, 64),
    width=(512, 512),
    num_shapes=(4, 6),
    shape_size=(24.0, 44.0),
    lamp_size=(24.0, 30.0),
    halo=2.8,
    gap=2.0,
    lamp_counts=True,
)
_LONG_SPLITS = {"train": 1200, "val": 200}
_MATCHES = replace(
    _LONG,
    decided_by="match",
    num_shapes=(8, 10),
    shape_size=(20.0, 28.0),
    lamp_size=(22.0, 28.0),
    halo=2.0,
)
DATASETS = {
    "lamps": LampsDataset(),
    "lamps_long": LampsDataset(_LONG, _LONG_SPLITS),
    # A quarter of the images has no lamp, so that no color can be told from the absence of others.
    "unlit_long": LampsDataset(replace(_LONG, decided_by="lamp or unlit"), _LONG_SPLITS),
    # The control of lamps_long: the same images, each shape labeled by its own outline.
    "outlines_long": LampsDataset(replace(_LONG, decided_by="outline"), _LONG_SPLITS),
    # Each shape has to find its own lamp: a summary of the image that all share is not enough.
    "matches_long": LampsDataset(_MATCHES, _LONG_SPLITS),
    # The same images, with classes that depend on the objects themselves.
    "tones_long": LampsDataset(replace(_MATCHES, decided_by="tone"), _LONG_SPLITS),
}


class _LampsHandler(PathHandler):
    """Generates a dataset when one of its annotation files is first opened.

    Both detectron2's loader and its COCOEvaluator open that file through PathManager, so either may
    come first.
    """

    def __init__(self, folder: str, dataset: LampsDataset) -> None:
        super().__init__()
        self._folder = folder
        self._dataset = dataset

    def _get_supported_prefixes(self) -> list[str]:
        return [annotation_file(self._folder, split) for split in self._dataset.splits]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        ensure_dataset(self._folder, self._dataset.splits, params=self._dataset.params)
        return path

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        return open(self._get_local_path(path), mode, buffering, **kwargs)


def register_lamps(root: str | None = None) -> None:
    """Register the datasets in directories of ``root``; nothing is written until one is used.

    Args:
        root: Directory of all datasets; by default the environment variable DETECTRON2_DATASETS, or
            ``datasets``, as for detectron2's own. A later call replaces an earlier one.
    """
    if root is None:
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for dataset_name, dataset in DATASETS.items():
        folder = os.path.join(root, dataset_name)
        PathManager.register_handler(_LampsHandler(folder, dataset), allow_override=True)
        metadata: dict[str, Any] = {"thing_classes": list(dataset.params.categories)}
        if {*dataset.params.categories} <= {*LAMP_COLORS, "unlit"}:
            colors = {**LAMP_COLORS, "unlit": (160, 160, 160)}
            metadata["thing_colors"] = [colors[name] for name in dataset.params.categories]
        for split in dataset.splits:
            name = f"{dataset_name}_{split}"
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
            register_coco_instances(
                name, metadata, annotation_file(folder, split), image_root(folder, split)
            )
