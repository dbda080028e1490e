"""The classes that a model was trained on: kept in its checkpoints, and compared with datasets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..checkpoint.latest import latest_checkpoint
from ..errors import summarize_error
from ..modeling.predictions import predicted_counts

CLASSES = "classes"  # key of a checkpoint
_KINDS = ("thing_classes", "stuff_classes", "keypoint_names")


class TrainedClasses:
    """Part of a checkpoint with the names of the classes and keypoints, in the model's order.

    Args:
        dataset_names: Names of the registered datasets that are trained on.
    """

    def __init__(self, dataset_names: Iterable[str]) -> None:
        self._name = next(iter(dataset_names), "")

    def state_dict(self) -> dict[str, list[str]]:
        """Return the names by metadata key; those of which the dataset has any."""
        metadata = MetadataCatalog.get(self._name)
        names = {key: metadata.get(key) for key in _KINDS}
        return {key: list(value) for key, value in names.items() if value}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Do nothing: what is trained on was compared before."""


def read_trained_classes(cfg: CfgNode, *, eval_only: bool, resume: bool) -> dict[str, list[str]]:
    """Read what `TrainedClasses` saved in the checkpoint that a run evaluates or resumes from.

    Args:
        cfg: Config of the run.
        eval_only: Whether the run only evaluates.
        resume: Whether the run resumes from its last checkpoint, if there is one.

    Returns:
        Names by metadata key; nothing if there is no such checkpoint, or if another program, or an
        earlier version, has written it.
    """
    last = latest_checkpoint(cfg.OUTPUT_DIR) if resume else ""
    path = last or (cfg.MODEL.WEIGHTS if eval_only else "")
    if not os.path.isfile(path):
        return {}
    try:  # by mmap, the weights are not read
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(checkpoint.get(CLASSES, {}))
    except Exception:  # of another format, or corrupt: loading the weights says so
        return {}


def check_all_classes(cfg: CfgNode, *, eval_only: bool, resume: bool) -> None:
    """Check that the datasets of a run have the model's classes, as far as their names are known.

    Args:
        cfg: Config of the run.
        eval_only: Whether the run only evaluates.
        resume: Whether the run resumes from its last checkpoint, if there is one.

    Raises:
        ValueError: If a dataset has more or fewer classes or keypoints than the model, or one of
            the same name at another index.
    """
    trained = read_trained_classes(cfg, eval_only=eval_only, resume=resume)
    for dataset_name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        names = {kind: _names(dataset_name, kind) for kind in _KINDS}
        for kind, (key, count) in predicted_counts(cfg).items():
            check_count(key, count, dataset_name, kind)
            _check_order(dataset_name, names[kind], trained.get(kind, []))
        if resume and not eval_only:
            _check_same(dataset_name, names, trained)
        if not (trained or eval_only):
            trained = names


def check_count(key: str, count: int, dataset_name: str, kind: str = "thing_classes") -> None:
    """Check that a dataset has as many classes or keypoints as a model, if its names are known.

    Args:
        key: Config key of the number, for the error message.
        count: Number that the model predicts.
        dataset_name: Name of a registered dataset.
        kind: Metadata key of the dataset's names.

    Raises:
        ValueError: If the dataset has another number.
    """
    names = _names(dataset_name, kind)
    if names and len(names) != count:
        raise ValueError(
            f"{key} is {count}, but dataset {dataset_name!r} has {len(names)}: {_excerpt(names)}."
        )


def _names(dataset_name: str, kind: str) -> list[str]:
    """Return the names of a dataset's classes or keypoints; none where nothing says them."""
    metadata = MetadataCatalog.get(dataset_name)
    names = metadata.get(kind)
    if names or kind != "thing_classes" or metadata.get("evaluator_type") != "coco":
        return list(names or [])
    # Registered by `register_coco_instances` without names: they are the file's.
    try:
        with PathManager.open(metadata.json_file, encoding="utf-8") as file:
            categories = json.load(file)["categories"]
        return [category["name"] for category in sorted(categories, key=lambda c: c["id"])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{metadata.json_file!r} of dataset {dataset_name!r} is not a COCO dataset: "
            f"{summarize_error(error)}."
        ) from error


def _check_order(dataset_name: str, names: list[str], trained: list[str]) -> None:
    for index, name in enumerate(names):
        if name in trained and trained[index : index + 1] != [name]:
            raise ValueError(
                f"{name!r} has index {index} among the classes or keypoints of dataset "
                f"{dataset_name!r}, but {trained.index(name)} among those that the model is "
                f"trained on: {_excerpt(trained)}."
            )


def _check_same(
    dataset_name: str, names: dict[str, list[str]], trained: dict[str, list[str]]
) -> None:
    for kind, known in trained.items():
        if names[kind] and names[kind] != known:
            raise ValueError(
                f"--resume continues to train on {_excerpt(known)}, but dataset {dataset_name!r} "
                f"has {_excerpt(names[kind])}; train on it in a run of its own, in another "
                f"OUTPUT_DIR."
            )


def _excerpt(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
