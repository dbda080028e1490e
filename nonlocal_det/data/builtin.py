"""Registers the lamps dataset with detectron2: ``lamps_train`` and ``lamps_val``."""

from __future__ import annotations

import os
from typing import IO, Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathHandler, PathManager

from .coco import SPLITS, annotation_file, ensure_dataset, image_folder
from .lamps import LAMP_COLORS


class _LampsHandler(PathHandler):
    """Draws the dataset when one of its annotation files is first asked for.

    Both detectron2's loader and its COCOEvaluator ask PathManager for that file, so either may
    come first.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def _get_supported_prefixes(self) -> list[str]:
        return [annotation_file(self._folder, split) for split in SPLITS]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        ensure_dataset(self._folder)
        return path

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        return open(self._get_local_path(path), mode, buffering, **kwargs)


def register_lamps(root: str | None = None) -> None:
    """Registers the dataset in the folder ``lamps`` of ``root``. Nothing is written until used.

    Args:
        root: folder of all datasets; defaults to the environment variable DETECTRON2_DATASETS, or
            ``datasets``, as for detectron2's own. A later call replaces an earlier one.
    """
    if root is None:
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    folder = os.path.join(root, "lamps")
    PathManager.register_handler(_LampsHandler(folder), allow_override=True)
    for split in SPLITS:
        name = f"lamps_{split}"
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
        metadata = {
            "thing_classes": list(LAMP_COLORS),
            "thing_colors": list(LAMP_COLORS.values()),
        }
        register_coco_instances(
            name, metadata, annotation_file(folder, split), image_folder(folder, split)
        )
