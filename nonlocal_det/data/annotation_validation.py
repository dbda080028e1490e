"""Validation of the annotations in a COCO file: references, boxes, masks and keypoints.

Each check adds its issues to the report and returns the annotations that are unusable. A check
checks all annotations that it can interpret, so that no check hides another's issues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from .coco_entries import Entry, excerpt, has_integers, is_finite_list, label
from .dataset_report import DatasetReport
from .masks import is_polygon, is_rle


def find_unusable(
    report: DatasetReport,
    annotations: list[Entry],
    images: dict[int, Entry],
    content: dict[str, Any],
    *,
    masks: bool,
) -> set[int]:
    """Find the annotations that cannot be used, and fix masks and keypoints in place.

    Args:
        report: Report that the issues are added to.
        annotations: Annotations with valid ids.
        images: Valid images by id.
        content: Content of the annotation file.
        masks: Whether the model predicts masks.

    Returns:
        ``id(annotation)`` of each unusable annotation.
    """
    checks: list[Callable[..., list[Entry]]] = [_check_references, _check_crowds, _check_boxes]
    if any(isinstance(a, dict) and a.get("segmentation") for a in content["annotations"]):
        checks.append(_check_masks if masks else _drop_invalid_masks)
    if report.keypoints:
        checks.append(_check_keypoints)
    return {
        id(annotation)
        for check in checks
        for annotation in check(report, annotations, images, content)
    }


def _check_references(
    report: DatasetReport,
    annotations: list[Entry],
    images: dict[int, Entry],
    content: dict[str, Any],
) -> list[Entry]:
    declared = {category["id"] for category in content["categories"]}
    report.add(
        "undeclared_category",
        [a for a in annotations if a["category_id"] not in declared],
        lambda a: f"category {a['category_id']} of {label(a)}",
    )
    listed = {image["id"] for image in content["images"] if has_integers(image, "id")}
    orphans = [a for a in annotations if a["image_id"] not in listed]
    report.add("no_such_image", orphans, lambda a: f"image {a['image_id']} of {label(a)}")
    ignored = [a for a in annotations if a.get("ignore")]
    report.add("ignored", ignored, label)
    return [*ignored, *(a for a in annotations if a["image_id"] not in images)]


def _check_crowds(report: DatasetReport, annotations: list[Entry], *_: Any) -> list[Entry]:
    """Check "iscrowd", and set it to 0 where it is missing."""
    without = [a for a in annotations if a.get("iscrowd") is None]
    for annotation in without:
        annotation["iscrowd"] = 0
    report.add("no_crowd", without, label)
    invalid = [a for a in annotations if a["iscrowd"] not in (0, 1)]
    report.add("bad_crowd", invalid, lambda a: f"{excerpt(a['iscrowd'])} of {label(a)}")
    return invalid


def _check_boxes(
    report: DatasetReport,
    annotations: list[Entry],
    images: dict[int, Entry],
    content: dict[str, Any],
) -> list[Entry]:
    by_type: dict[str, list[Entry]] = {
        issue_type: [] for issue_type in ("bad_box", "empty_box", "outside", "beyond")
    }
    for annotation in annotations:
        issue_type = _box_issue(annotation.get("bbox"), images.get(annotation["image_id"]))
        if issue_type:
            by_type[issue_type].append(annotation)
    for issue_type, entries in by_type.items():
        report.add(issue_type, entries, lambda a: f"{excerpt(a.get('bbox'))} of {label(a)}")
    if annotations and all(_is_relative(annotation.get("bbox")) for annotation in annotations):
        report.add("relative_boxes", annotations, lambda a: f"{excerpt(a['bbox'])} of {label(a)}")
    return [*by_type["bad_box"], *by_type["empty_box"], *by_type["outside"]]


def _is_relative(box: Any) -> bool:
    """Whether a box is not in pixels but in shares of the image, from 0 to 1."""
    return is_finite_list(box) and len(box) == 4 and min(box) >= 0 and 0 < max(box) <= 1


def _box_issue(box: Any, image: Optional[Entry]) -> Optional[str]:
    """Return the type of issue of a box, if any."""
    if not is_finite_list(box) or len(box) != 4:
        return "bad_box"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "empty_box"
    if image is None:
        return None
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return "outside"
    if min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1:
        return "beyond"
    return None


def _check_masks(
    report: DatasetReport,
    annotations: list[Entry],
    images: dict[int, Entry],
    content: dict[str, Any],
) -> list[Entry]:
    """Check segmentations, and remove invalid polygons from them."""
    missing, polygon, rle, empty = [], [], [], []
    for annotation in annotations:
        mask, image = annotation.get("segmentation"), images.get(annotation["image_id"])
        if not mask:
            missing.append(annotation)
        elif isinstance(mask, list):
            valid = [one for one in mask if is_polygon(one, image)]
            if len(valid) < len(mask):
                polygon.append(annotation)
                annotation["segmentation"] = valid
                if not valid:
                    empty.append(annotation)
        elif not is_rle(mask, image):
            rle.append(annotation)
    report.add("no_mask", missing, label)
    report.add("bad_polygon", polygon, label)
    report.add("bad_rle", rle, label)
    return [*missing, *empty, *rle]


def _drop_invalid_masks(
    report: DatasetReport,
    annotations: list[Entry],
    images: dict[int, Entry],
    content: dict[str, Any],
) -> list[Entry]:
    """Remove segmentations that detectron2 cannot read, for a model that does not need them."""
    invalid = []
    for annotation in annotations:
        mask, image = annotation.get("segmentation"), images.get(annotation["image_id"])
        polygons = isinstance(mask, list) and all(is_polygon(one, image) for one in mask)
        if mask and not polygons and not is_rle(mask, image):
            invalid.append(annotation)
            annotation["segmentation"] = []
    report.add("unused_mask", invalid, label)
    return []


def _check_keypoints(
    report: DatasetReport,
    annotations: list[Entry],
    images: dict[int, Entry],
    content: dict[str, Any],
) -> list[Entry]:
    """Check keypoints; add missing ones as not visible, and count the visible ones."""
    length = 3 * len(report.keypoints)
    missing, invalid, miscounted = [], [], []
    for annotation in annotations:
        points = annotation.get("keypoints")
        if not points:
            missing.append(annotation)
            annotation["keypoints"] = [0] * length
            annotation["num_keypoints"] = 0
        elif not is_finite_list(points) or len(points) != length:
            invalid.append(annotation)
        else:
            visible = sum(v > 0 for v in points[2::3])
            if annotation.get("num_keypoints") != visible:
                miscounted.append(annotation)
                annotation["num_keypoints"] = visible
    report.add("no_keypoints", missing, label)
    report.add("bad_keypoints", invalid, label)
    report.add("num_keypoints", miscounted, label)
    return invalid
