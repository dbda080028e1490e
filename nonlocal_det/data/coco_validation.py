"""Finds all that is wrong with a dataset in COCO's format, at once, before anything trains on it.

Of the images only the headers are read.

The format: https://cocodataset.org/#format-data. Boxes are (x, y, width, height), in pixels.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

from PIL import Image

from .dataset_report import Report

Entry = dict[str, Any]


def validate_coco(
    json_file: str, image_root: str, *, masks: bool = True, keypoints: bool = False
) -> Report:
    """Read a dataset and report everything that is wrong with it.

    Args:
        json_file: COCO annotations of instances.
        image_root: what their file names are relative to.
        masks: whether masks are used. Where no annotation has one, none is asked for.
        keypoints: whether keypoints are used.
    """
    report = Report(json_file, image_root)
    content = _read(report)
    if not os.path.isdir(image_root):
        report.add("no_folder", [image_root])
    if content is None:
        return report
    report.given = {part: len(content[part]) for part in ("images", "annotations")}
    # Each check looks at all entries that it can understand, so that none hides another's findings.
    content["categories"] = _check_categories(report, content["categories"], keypoints)
    images = _check_images(report, content["images"])
    annotations = _check_entries(report, content["annotations"])
    unusable = {
        id(annotation)
        for check in (_check_references, _check_boxes, *_shape_checks(report, content, masks))
        for annotation in check(report, annotations, images, content)
    }
    content["images"] = _with_files(report, list(images.values()))
    _keep_usable(report, content, annotations, unusable)
    report.content = content
    _check_rest(report)
    return report


def compare_splits(train: Report, val: Report) -> None:
    """Add to the report of a validation set what does not fit that of the training set."""
    if train.classes and val.classes and train.classes != val.classes:
        val.add("other_categories", [_difference(train.classes, val.classes)])
    if train.keypoints and val.keypoints and train.keypoints != val.keypoints:
        val.add("other_categories", ["keypoints: " + _difference(train.keypoints, val.keypoints)])
    trained = {_path(train, image) for image in train.content["images"]}
    shared = [image for image in val.content["images"] if _path(val, image) in trained]
    val.add("shared_image", shared, _name)


def _difference(train: list[str], val: list[str]) -> str:
    for mine, other, which in ((train, val, "training"), (val, train, "validation")):
        only = [name for name in mine if name not in other]
        if only:
            return f"only {which} has {', '.join(only[:5])}{', ...' if len(only) > 5 else ''}"
    return f"the order is {', '.join(train[:5])} and {', '.join(val[:5])}"


def _path(report: Report, image: Entry) -> str:
    return os.path.abspath(os.path.join(report.image_root, image["file_name"]))


def _read(report: Report) -> Optional[dict[str, Any]]:
    try:
        with open(report.json_file, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or str(error)
        report.add("unreadable", [said])
        return None
    if not isinstance(content, dict):
        report.add("not_a_dataset", [_held(content)])
        return None
    parts = ("images", "annotations", "categories")
    wrong = [f"{part} is no list" for part in parts if not isinstance(content.get(part, []), list)]
    wrong += [f"{part} is missing" for part in parts if part not in content]
    report.add("not_a_dataset", wrong)
    return None if wrong else content


def _held(content: Any) -> str:
    if not isinstance(content, list):
        return "it holds a single value"
    results = ", as files of COCO's results do" if content and isinstance(content[0], dict) else ""
    return f"it holds a list of {len(content)}{results}"


def _check_categories(report: Report, categories: list[Any], keypoints: bool) -> list[Entry]:
    good = [c for c in categories if _has_ids(c, "id") and isinstance(c.get("name"), str)]
    good = [c for c in good if isinstance(c.get("keypoints", []), list)]
    report.add("bad_category", [c for c in categories if c not in good], _short)
    if not categories:
        report.add("no_categories", [""])
    report.add("same_category_id", _repeated(c["id"] for c in good))
    report.add("same_name", _repeated(c["name"] for c in good))
    with_keypoints = [c for c in good if c.get("keypoints")]
    if keypoints and not with_keypoints:
        report.add("no_keypoint_names", [""])
    if keypoints:
        report.keypoints = next((c["keypoints"] for c in with_keypoints), [])
        others = [c for c in with_keypoints if c["keypoints"] != report.keypoints]
        report.add("keypoints_differ", others, lambda c: c["name"])
    return good


def _check_images(report: Report, images: list[Any]) -> dict[int, Entry]:
    """The well-formed images by id."""
    good = [
        image
        for image in images
        if _has_ids(image, "id", "width", "height")
        and isinstance(image.get("file_name"), str)
        and min(image["width"], image["height"]) > 0
    ]
    if len(good) < len(images):
        kept = set(map(id, good))
        report.add("bad_image", [i for i in images if id(i) not in kept], _short)
    report.add("same_image_id", _repeated(image["id"] for image in good))
    report.add("same_file", _repeated(os.path.normpath(image["file_name"]) for image in good))
    return {image["id"]: image for image in good}


def _with_files(report: Report, images: list[Entry]) -> list[Entry]:
    """The images whose files can be read and are of the right size."""
    if not os.path.isdir(report.image_root):
        return images
    paths = [os.path.join(report.image_root, image["file_name"]) for image in images]
    # Threads wait together where a disk is slow.
    with ThreadPoolExecutor(8) as pool:
        blocks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
        sizes = [size for block in pool.map(_sizes, blocks) for size in block]
    found = list(zip(images, sizes))
    report.add("missing_image", [image for image, size in found if size is None], _name)
    report.add("unreadable_image", [image for image, size in found if size == (0, 0)], _name)
    real = [(image, size) for image, size in found if size not in (None, (0, 0))]
    other = [entry for entry in real if entry[1] != (entry[0]["width"], entry[0]["height"])]
    report.add(
        "other_size",
        other,
        lambda entry: (
            f"{_name(entry[0])} is {entry[1][0]} x {entry[1][1]}, "
            f"not {entry[0]['width']} x {entry[0]['height']}"
        ),
    )
    return [image for image, size in real if size == (image["width"], image["height"])]


def _sizes(paths: Iterable[str]) -> list[Optional[tuple[int, int]]]:
    return [image_size(path) for path in paths]


def image_size(path: str) -> Optional[tuple[int, int]]:
    """Width and height of an image as it is seen, by its header.

    Returns:
        None if there is no file, (0, 0) if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            # What a camera held upright noted; detectron2 turns the picture likewise.
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception:  # Pillow's readers raise errors of many kinds for broken files
        return 0, 0


def _check_entries(report: Report, annotations: list[Any]) -> list[Entry]:
    """The well-formed annotations."""
    good = [a for a in annotations if _has_ids(a, "id", "image_id", "category_id")]
    if len(good) < len(annotations):
        kept = set(map(id, good))
        report.add("bad_annotation", [a for a in annotations if id(a) not in kept], _short)
    report.add("same_annotation_id", _repeated(a["id"] for a in good))
    report.add("id_zero", [a["id"] for a in good if a["id"] == 0])
    return good


# Checks of annotations: each adds to the report, and returns those that cannot be used.


def _check_references(
    report: Report, annotations: list[Entry], images: dict[int, Entry], content: dict[str, Any]
) -> list[Entry]:
    declared = {category["id"] for category in content["categories"]}
    report.add(
        "undeclared_category",
        [a for a in annotations if a["category_id"] not in declared],
        lambda a: f"category {a['category_id']} of {_label(a)}",
    )
    listed = {image["id"] for image in content["images"] if _has_ids(image, "id")}
    homeless = [a for a in annotations if a["image_id"] not in listed]
    report.add("no_such_image", homeless, lambda a: f"image {a['image_id']} of {_label(a)}")
    ignored = [a for a in annotations if a.get("ignore")]
    report.add("ignored", ignored, _label)
    return [*ignored, *(a for a in annotations if a["image_id"] not in images)]


def _check_boxes(
    report: Report, annotations: list[Entry], images: dict[int, Entry], content: dict[str, Any]
) -> list[Entry]:
    found: dict[str, list[Entry]] = {
        kind: [] for kind in ("bad_box", "empty_box", "outside", "beyond")
    }
    for annotation in annotations:
        box, image = annotation.get("bbox"), images.get(annotation["image_id"])
        if not _are_numbers(box) or len(box) != 4:
            found["bad_box"].append(annotation)
            continue
        x, y, width, height = box
        if width <= 0 or height <= 0:
            found["empty_box"].append(annotation)
        elif image is None:
            continue
        elif x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
            found["outside"].append(annotation)
        elif min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1:
            found["beyond"].append(annotation)
    for kind, entries in found.items():
        report.add(kind, entries, lambda a: f"{_short(a.get('bbox'))} of {_label(a)}")
    return [*found["bad_box"], *found["empty_box"], *found["outside"]]


def _shape_checks(report: Report, content: dict[str, Any], masks: bool) -> list[Callable]:
    """The checks of masks and of keypoints, as far as they are used."""
    has_masks = any(isinstance(a, dict) and a.get("segmentation") for a in content["annotations"])
    checks: list[Callable] = [_check_masks] if masks and has_masks else []
    return [*checks, _check_keypoints] if report.keypoints else checks


def _check_masks(
    report: Report, annotations: list[Entry], images: dict[int, Entry], content: dict[str, Any]
) -> list[Entry]:
    """Also removes the polygons that are none."""
    none, polygon, rle, empty = [], [], [], []
    for annotation in annotations:
        mask = annotation.get("segmentation")
        if not mask:
            none.append(annotation)
        elif isinstance(mask, list):
            good = [p for p in mask if _are_numbers(p) and len(p) >= 6 and len(p) % 2 == 0]
            if len(good) < len(mask):
                polygon.append(annotation)
                annotation["segmentation"] = good
                if not good:
                    empty.append(annotation)
        elif not _is_rle(mask, images.get(annotation["image_id"])):
            rle.append(annotation)
    report.add("no_mask", none, _label)
    report.add("bad_polygon", polygon, _label)
    report.add("bad_rle", rle, _label)
    return [*none, *empty, *rle]


def _is_rle(mask: Any, image: Optional[Entry]) -> bool:
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), (str, list)):
        return False
    size, counts = mask.get("size"), mask["counts"]
    if not _are_numbers(size) or len(size) != 2:
        return False
    if isinstance(counts, list) and not (_are_numbers(counts) and sum(counts) == size[0] * size[1]):
        return False
    return image is None or list(size) == [image["height"], image["width"]]


def _check_keypoints(
    report: Report, annotations: list[Entry], images: dict[int, Entry], content: dict[str, Any]
) -> list[Entry]:
    """Also counts the visible ones, and gives every annotation its list."""
    length = 3 * len(report.keypoints)
    none, bad, miscounted = [], [], []
    for annotation in annotations:
        points = annotation.get("keypoints")
        if not points:
            none.append(annotation)
            annotation["keypoints"] = [0] * length
            annotation["num_keypoints"] = 0
        elif not _are_numbers(points) or len(points) != length:
            bad.append(annotation)
        else:
            visible = sum(v > 0 for v in points[2::3])
            if annotation.get("num_keypoints") != visible:
                miscounted.append(annotation)
                annotation["num_keypoints"] = visible
    report.add("no_keypoints", none, _label)
    report.add("bad_keypoints", bad, _label)
    report.add("num_keypoints", miscounted, _label)
    return bad


def _keep_usable(
    report: Report, content: dict[str, Any], annotations: list[Entry], unusable: set[int]
) -> None:
    """Leave out what cannot be used, and fill in what COCO's evaluation needs of the rest."""
    listed = {image["id"] for image in content["images"]}
    kept = [a for a in annotations if id(a) not in unusable and a["image_id"] in listed]
    content["annotations"] = kept
    without_area = [a for a in kept if not _are_numbers([a.get("area")])]
    for annotation in without_area:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    without_crowd = [a for a in kept if a.get("iscrowd") not in (0, 1)]
    for annotation in without_crowd:
        annotation["iscrowd"] = 0
    report.add("no_area", without_area, _label)
    report.add("no_crowd", without_crowd, _label)


def _check_rest(report: Report) -> None:
    """What is worth knowing of what is left."""
    content = report.content
    used = {a["category_id"] for a in content["annotations"]}
    annotated = {a["image_id"] for a in content["annotations"]}
    if not content["images"]:
        report.add("no_images", [""])
    if not content["annotations"]:
        report.add("no_annotations", [""])
        return
    unused = [category["name"] for category in content["categories"] if category["id"] not in used]
    report.add("unused_category", unused)
    bare = [image for image in content["images"] if image["id"] not in annotated]
    report.add("without_annotations", bare, _name)


def _has_ids(entry: Any, *keys: str) -> bool:
    if not isinstance(entry, dict):
        return False
    for key in keys:
        if type(entry.get(key)) is not int:  # True is no number here
            return False
    return True


def _are_numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers."""
    if not isinstance(values, list):
        return False
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _name(image: Entry) -> str:
    return image["file_name"]


def _label(annotation: Entry) -> str:
    return f"annotation {annotation['id']}"


def _short(entry: Any) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 60 else text[:57] + "..."
