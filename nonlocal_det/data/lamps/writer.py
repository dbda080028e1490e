"""The lamps dataset on disk: PNG images and annotations in COCO format.

    <folder>/annotations/instances_<split>.json
    <folder>/<split>/000001.png ...

In addition to COCO's keys, an image has ``cue_xy`` (center of the lamp) and ``seed`` (arguments of
`image_rng`), and an annotation has ``cue_distance``, from the center of its box to the lamp's.
Where shapes may be unlit, an image has ``cues`` instead (the centers of all lamps), and an
annotation has ``cue_xy`` too; both of its keys are null if it has no lamp. All are in pixels. The
files hold no date and no path: the same arguments give the same bytes.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from .generator import GENERATOR_VERSION, Instance, Scene, render_scene
from .params import LampsParams

SPLITS = {"train": 400, "val": 100}


def annotation_file(folder: str, split: str) -> str:
    """Return the path of a split's annotation file."""
    return os.path.join(folder, "annotations", f"instances_{split}.json")


def image_root(folder: str, split: str) -> str:
    """Return the path of a split's image directory."""
    return os.path.join(folder, split)


def image_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the random number generator of one image, which does not depend on other images.

    Args:
        seed: Random seed of the dataset.
        split: Name of the split.
        index: Index of the image in its split.
    """
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index])


def write_dataset(
    folder: str, split: str, count: int, *, seed: int = 0, params: LampsParams | None = None
) -> None:
    """Generate a split and write it into a directory, over the files there.

    Use `ensure_dataset` where the process may be interrupted, or shares the directory with others.

    Args:
        folder: Directory of the dataset; created if missing.
        split: Name of the split.
        count: Number of images.
        seed: Random seed of the dataset.
        params: Parameters of the images; by default `LampsParams()`.
    """
    params = params or LampsParams()
    os.makedirs(os.path.dirname(annotation_file(folder, split)), exist_ok=True)
    os.makedirs(image_root(folder, split), exist_ok=True)
    images, annotations = [], []
    several = params.may_be_unlit
    annotation_ids = itertools.count(1)  # pycocotools treats the id 0 as "not matched"
    for index in range(count):
        scene = render_scene(image_rng(seed, split, index), params)
        image = {
            "id": index + 1,
            "file_name": f"{index + 1:06d}.png",
            "height": scene.image.shape[0],
            "width": scene.image.shape[1],
            **_cues(scene, several),
            "seed": [seed, split, index],
        }
        path = os.path.join(image_root(folder, split), image["file_name"])
        Image.fromarray(scene.image).save(path)
        images.append(image)
        annotations += [
            {"id": next(annotation_ids), "image_id": image["id"], **_annotation(instance, several)}
            for instance in scene.instances
        ]
    content = {
        "info": _info(split, count, seed, params),
        "licenses": [],
        "categories": [{"id": i, "name": n} for i, n in enumerate(params.categories, start=1)],
        "images": images,
        "annotations": annotations,
    }
    with open(annotation_file(folder, split), "w", encoding="utf-8") as file:
        json.dump(content, file)


def ensure_dataset(
    folder: str,
    splits: Mapping[str, int] = SPLITS,
    *,
    seed: int = 0,
    params: LampsParams | None = None,
) -> None:
    """Generate the dataset unless its directory holds it already.

    The directory appears complete or not at all, and any number of processes may call this at once.

    Args:
        folder: Directory of the dataset.
        splits: Number of images of each split.
        seed: Random seed of the dataset.
        params: Parameters of the images; by default `LampsParams()`.

    Raises:
        FileExistsError: If the directory holds something else, such as images of another seed,
            which is neither used nor overwritten.
        OSError: If the directory cannot be written.
    """
    params = params or LampsParams()
    if _is_free(folder):
        try:
            _write_atomically(folder, splits, seed, params)
        except OSError as error:
            raise OSError(
                f"Cannot write the lamps dataset to {os.path.abspath(folder)} "
                f"({error.strerror or error}): set the environment variable DETECTRON2_DATASETS to "
                "a writable directory."
            ) from error
    for split, count in splits.items():
        if _read_info(annotation_file(folder, split)) != _info(split, count, seed, params):
            raise FileExistsError(
                f"{os.path.abspath(folder)} is not the lamps dataset that this version generates "
                "with these settings: delete it to have it generated again, or set the environment "
                "variable DETECTRON2_DATASETS to another directory."
            )


def read_params(json_file: str) -> LampsParams:
    """The parameters of the images that an annotation file describes.

    Raises:
        ValueError: If it is not that of a lamps dataset.
    """
    info = _read_info(json_file)
    if not isinstance(info, dict) or "params" not in info:
        raise ValueError(f"{json_file!r} is not the annotation file of a lamps dataset.")
    fields = info["params"].items()
    return LampsParams(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields})


def _is_free(folder: str) -> bool:
    return not os.path.exists(folder) or (os.path.isdir(folder) and not os.listdir(folder))


def _write_atomically(
    folder: str, splits: Mapping[str, int], seed: int, params: LampsParams
) -> None:
    """Write the dataset to a temporary directory, then rename it."""
    parent, name = os.path.split(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as temporary:
        # One level down, since a temporary directory itself is closed to other users.
        staged = os.path.join(temporary, name)
        for split, count in splits.items():
            write_dataset(staged, split, count, seed=seed, params=params)
        try:
            os.rename(staged, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Another process was first; the caller checks its files.


def _read_info(path: str) -> object:
    """Return the "info" of an annotation file; None if it has none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)["info"]
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None


def _info(split: str, count: int, seed: int, params: LampsParams) -> dict:
    info = {
        "description": f"Lamps: shapes whose category is decided by the {params.decided_by}.",
        "version": GENERATOR_VERSION,
        "split": split,
        "count": count,
        "seed": seed,
        "params": dataclasses.asdict(params),
    }
    return json.loads(json.dumps(info))  # as it reads after a round trip: tuples become lists


def _cues(scene: Scene, several: bool) -> dict:
    """Return the keys of an image that locate its lamps, of which there may be several or none."""
    if several:
        return {"cues": [_round_all(lamp.center) for lamp in scene.lamps]}
    (lamp,) = scene.lamps
    return {"cue_xy": _round_all(lamp.center)}


def _annotation(instance: Instance, several: bool) -> dict:
    """Return the keys of a COCO annotation that depend on the instance alone."""
    low, high = instance.polygon.min(axis=0), instance.polygon.max(axis=0)
    cue = instance.cue
    annotation = {
        "category_id": instance.category + 1,
        "bbox": _round_all([*low, *(high - low)]),
        "area": _round_all([_area(instance.polygon)])[0],
        "iscrowd": 0,
        "segmentation": [_round_all(instance.polygon.ravel())],
        "cue_distance": _round_all([math.dist((low + high) / 2, cue)])[0] if cue else None,
    }
    if several:
        annotation["cue_xy"] = _round_all(cue) if cue else None
    return annotation


def _area(polygon: np.ndarray) -> float:
    """Return the area of a polygon (V, 2) by the shoelace formula."""
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _round_all(values: Iterable[float]) -> list[float]:
    return [round(float(value), 2) for value in values]
