"""Validation of a dataset in COCO format: every issue at once, before anything trains on it.

Only the headers of the images are read. Boxes are (x, y, width, height) in pixels.

Format: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

from PIL import Image

from .annotation_validation import find_unusable
from .coco_entries import (
    Entry,
    duplicates,
    excerpt,
    file_name,
    has_integers,
    is_finite_list,
    label,
)
from .dataset_report import DatasetReport

# Where Pillow finds an orientation. Others are not asked: PNG would be decoded for the answer.
_ORIENTED = {"exif", "xmp", "XML:com.adobe.xmp"}


def validate_coco(
    json_file: str, image_root: str, *, masks: bool = True, keypoints: bool = False
) -> DatasetReport:
    """Read a dataset and report all of its issues.

    Args:
        json_file: Path of a COCO instance annotation file.
        image_root: Directory that file names in it are relative to.
        masks: Whether the model predicts masks. If no annotation has one, none is required.
        keypoints: Whether the model predicts keypoints.

    Returns:
        Report with the issues, and with the dataset as it would be used.
    """
    report = DatasetReport(json_file, image_root)
    content = _read(report)
    if not os.path.isdir(image_root):
        report.add("no_folder", [image_root])
    if content is None:
        return report
    report.num_in_file = {part: len(content[part]) for part in ("images", "annotations")}
    content["categories"] = _check_categories(report, content["categories"], keypoints)
    images = _check_images(report, content["images"])
    annotations = _check_ids(report, content["annotations"])
    unusable = find_unusable(report, annotations, images, content, masks=masks)
    content["images"] = _check_files(report, list(images.values()))
    content["annotations"] = _keep_usable(report, annotations, content["images"], unusable)
    report.dataset = content
    _check_coverage(report)
    return report


def _read(report: DatasetReport) -> Optional[dict[str, Any]]:
    """Return the content of the annotation file; None if it is not a COCO dataset."""
    try:
        with open(report.json_file, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        report.add("unreadable", [getattr(error, "strerror", None) or str(error)])
        return None
    if not isinstance(content, dict):
        report.add("not_a_dataset", [_describe(content)])
        return None
    parts = ("images", "annotations", "categories")
    wrong = [f"{part} is no list" for part in parts if not isinstance(content.get(part, []), list)]
    wrong += [f"{part} is missing" for part in parts if part not in content]
    report.add("not_a_dataset", wrong)
    return None if wrong else content


def _describe(content: Any) -> str:
    if not isinstance(content, list):
        return "it holds a single value"
    results = ", like a COCO results file" if content and isinstance(content[0], dict) else ""
    return f"it holds a list of {len(content)}{results}"


def _check_categories(report: DatasetReport, categories: list[Any], keypoints: bool) -> list[Entry]:
    """Return the valid categories."""
    valid = [c for c in categories if has_integers(c, "id") and isinstance(c.get("name"), str)]
    valid = [c for c in valid if isinstance(c.get("keypoints", []), list)]
    report.add("bad_category", [c for c in categories if c not in valid], excerpt)
    if not categories:
        report.add("no_categories", [""])
    report.add("same_category_id", duplicates(c["id"] for c in valid))
    report.add("same_name", duplicates(c["name"] for c in valid))
    if keypoints:
        _check_keypoint_names(report, valid)
    return valid


def _check_keypoint_names(report: DatasetReport, categories: list[Entry]) -> None:
    """Set the report's keypoints to those of the categories, which must all be the same."""
    with_keypoints = [c for c in categories if c.get("keypoints")]
    if not with_keypoints:
        report.add("no_keypoint_names", [""])
        return
    report.keypoints = with_keypoints[0]["keypoints"]
    others = [c for c in with_keypoints if c["keypoints"] != report.keypoints]
    report.add("keypoints_differ", others, lambda c: c["name"])


def _check_images(report: DatasetReport, images: list[Any]) -> dict[int, Entry]:
    """Return the valid images by id."""
    valid = [
        image
        for image in images
        if has_integers(image, "id", "width", "height")
        and isinstance(image.get("file_name"), str)
        and min(image["width"], image["height"]) > 0
    ]
    if len(valid) < len(images):
        kept = set(map(id, valid))
        report.add("bad_image", [i for i in images if id(i) not in kept], excerpt)
    report.add("same_image_id", duplicates(image["id"] for image in valid))
    report.add("same_file", duplicates(os.path.normpath(file_name(image)) for image in valid))
    return {image["id"]: image for image in valid}


def _check_files(report: DatasetReport, images: list[Entry]) -> list[Entry]:
    """Return the images whose files can be read and have the size that the JSON says."""
    if not os.path.isdir(report.image_root):
        return images
    sizes = _image_sizes([os.path.join(report.image_root, file_name(image)) for image in images])
    found = list(zip(images, sizes))
    report.add("missing_image", [image for image, size in found if size is None], file_name)
    report.add("unreadable_image", [image for image, size in found if size == (0, 0)], file_name)
    real = [(image, size) for image, size in found if size not in (None, (0, 0))]
    other = [entry for entry in real if entry[1] != (entry[0]["width"], entry[0]["height"])]
    report.add(
        "other_size",
        other,
        lambda entry: (
            f"{file_name(entry[0])} is {entry[1][0]} x {entry[1][1]}, "
            f"not {entry[0]['width']} x {entry[0]['height']}"
        ),
    )
    return [image for image, size in real if size == (image["width"], image["height"])]


def _image_sizes(paths: list[str]) -> list[Optional[tuple[int, int]]]:
    """Return `image_size` of each path, read in threads, which hides the latency of a slow disk."""
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    with ThreadPoolExecutor(8) as pool:
        sizes = pool.map(lambda chunk: [image_size(path) for path in chunk], chunks)
        return list(itertools.chain.from_iterable(sizes))


def image_size(path: str) -> Optional[tuple[int, int]]:
    """Read the size of an image from its header, after the rotation that its EXIF data ask for.

    Returns:
        (width, height) in pixels; None if there is no such file, (0, 0) if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            # detectron2 applies the orientation of EXIF or XMP too; 5 to 8 swap width and height.
            oriented = image.format == "TIFF" or not _ORIENTED.isdisjoint(image.info)
            turned = oriented and image.getexif().get(0x0112, 1) >= 5
            return (image.height, image.width) if turned else image.size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception:  # Pillow's readers raise errors of many kinds for corrupt files
        return 0, 0


def _check_ids(report: DatasetReport, annotations: list[Any]) -> list[Entry]:
    """Return the annotations with valid ids."""
    valid = [a for a in annotations if has_integers(a, "id", "image_id", "category_id")]
    if len(valid) < len(annotations):
        kept = set(map(id, valid))
        report.add("bad_annotation", [a for a in annotations if id(a) not in kept], excerpt)
    report.add("same_annotation_id", duplicates(a["id"] for a in valid))
    return valid


def _keep_usable(
    report: DatasetReport, annotations: list[Entry], images: list[Entry], unusable: set[int]
) -> list[Entry]:
    """Return the usable annotations of the images, with the values that COCO evaluation needs."""
    listed = {image["id"] for image in images}
    kept = [a for a in annotations if id(a) not in unusable and a["image_id"] in listed]
    without_area = [a for a in kept if not is_finite_list([a.get("area")]) or a["area"] < 0]
    for annotation in without_area:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    report.add("no_area", without_area, label)
    return kept


def _check_coverage(report: DatasetReport) -> None:
    """Check that images and annotations remain, and which categories and images have none."""
    dataset = report.dataset
    if not dataset["images"]:
        report.add("no_images", [""])
    if not dataset["annotations"]:
        report.add("no_annotations", [""])
        return
    objects = [a for a in dataset["annotations"] if not a["iscrowd"]]
    if not objects:
        report.add("no_objects", [""])
    elif report.keypoints and not any(a["num_keypoints"] for a in objects):
        report.add("no_visible_keypoints", [""])
    used = {a["category_id"] for a in dataset["annotations"]}
    annotated = {a["image_id"] for a in dataset["annotations"]}
    unused = [category["name"] for category in dataset["categories"] if category["id"] not in used]
    report.add("unused_category", unused)
    bare = [image for image in dataset["images"] if image["id"] not in annotated]
    report.add("without_annotations", bare, file_name)
