"""What can be wrong with a dataset in COCO's format, and the report of what is.

What makes a file ambiguous stops a run. What makes one entry unusable leaves that entry out. What
COCO's evaluation needs and can be derived is filled in. The rest is worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STOPS, LEFT_OUT, FILLED_IN, NOTE = "stops", "left out", "filled in", "note"


class Kind(NamedTuple):
    """A kind of problem: what becomes of it, what it is, and what is done or to do."""

    severity: str
    what: str
    remedy: str


KINDS = {
    # The file.
    "unreadable": Kind(STOPS, "the file cannot be read as JSON", "give a COCO annotation file"),
    "not_a_dataset": Kind(
        STOPS,
        "the file is no COCO dataset",
        "it must be an object with the lists images, annotations and categories",
    ),
    "no_folder": Kind(STOPS, "the folder of images does not exist", "give the right folder"),
    "no_images": Kind(STOPS, "no image can be used", "mend what was left out"),
    "no_annotations": Kind(STOPS, "no annotation can be used", "mend what was left out"),
    "no_categories": Kind(STOPS, "there is no category", "list the classes in categories"),
    # Categories.
    "bad_category": Kind(
        STOPS, "categories without a whole number as id or a name", "give each an id and a name"
    ),
    "same_category_id": Kind(STOPS, "category ids given twice", "give each category its own"),
    "undeclared_category": Kind(
        STOPS, "annotations of a category that is not declared", "add it to categories"
    ),
    "no_keypoint_names": Kind(
        STOPS,
        "the model finds keypoints, but no category names any",
        "list their names in the category's keypoints, or take a configuration without",
    ),
    "keypoints_differ": Kind(
        STOPS, "categories whose keypoints differ", "a model has one list of keypoints"
    ),
    "other_categories": Kind(
        STOPS, "the sets for training and for validation differ", "give both the same, in one order"
    ),
    "num_classes": Kind(
        STOPS,
        "the configuration's model has another number of classes",
        "set it to that of the dataset",
    ),
    "same_name": Kind(NOTE, "category names given twice", "they stay two classes"),
    "unused_category": Kind(NOTE, "categories without an annotation", "they stay classes"),
    # Images.
    "bad_image": Kind(
        LEFT_OUT,
        "images without id, file_name, width or height",
        "all but the name are whole numbers",
    ),
    "same_image_id": Kind(STOPS, "image ids given twice", "give each image its own"),
    "missing_image": Kind(LEFT_OUT, "images whose file does not exist", "so are their annotations"),
    "unreadable_image": Kind(
        LEFT_OUT, "images whose file cannot be read", "so are their annotations"
    ),
    "other_size": Kind(
        LEFT_OUT, "images of another size than the JSON says", "so are their annotations"
    ),
    "same_file": Kind(NOTE, "images whose file is another's too", "both stay"),
    "without_annotations": Kind(
        NOTE, "images without annotations", "evaluated; training passes over them"
    ),
    "shared_image": Kind(
        NOTE, "images for validation are also trained on", "the numbers will be too good"
    ),
    # Annotations.
    "bad_annotation": Kind(
        LEFT_OUT, "annotations without id, image_id or category_id", "all are whole numbers"
    ),
    "same_annotation_id": Kind(STOPS, "annotation ids given twice", "give each its own"),
    "no_such_image": Kind(LEFT_OUT, "annotations of images that are not listed", "add the images"),
    "ignored": Kind(LEFT_OUT, "annotations with ignore set", "COCO's word for it is iscrowd"),
    "bad_box": Kind(LEFT_OUT, "boxes that are not 4 finite numbers", "x, y, width, height"),
    "empty_box": Kind(
        LEFT_OUT, "boxes without width or height", "boxes are x, y, width, height, not two corners"
    ),
    "outside": Kind(LEFT_OUT, "boxes wholly outside their image", "boxes are in pixels"),
    "beyond": Kind(NOTE, "boxes more than a pixel beyond their image", "training clips them"),
    "bad_polygon": Kind(
        LEFT_OUT,
        "polygons with fewer than 3 points, an odd number of coordinates, or no numbers",
        "so is the annotation, if it has no other",
    ),
    "bad_rle": Kind(
        LEFT_OUT, "masks whose RLE is not of the image's size", "size is [height, width]"
    ),
    "no_mask": Kind(
        LEFT_OUT, "annotations without a mask, among others with one", "the model learns masks"
    ),
    "bad_keypoints": Kind(
        LEFT_OUT, "keypoints that are not x, y, visibility for each name", "so is the annotation"
    ),
    "no_keypoints": Kind(FILLED_IN, "annotations without keypoints", "none is visible then"),
    "num_keypoints": Kind(FILLED_IN, "num_keypoints missing or wrong", "they are counted"),
    "no_area": Kind(FILLED_IN, "annotations without area", "with that of the box"),
    "no_crowd": Kind(FILLED_IN, "annotations without iscrowd", "with 0"),
    "id_zero": Kind(
        NOTE, "annotations with the id 0", "COCO's evaluation counts it as not found: start at 1"
    ),
}


@dataclass(frozen=True)
class Finding:
    """How often a problem of one kind was met, and its first examples."""

    kind: str
    count: int
    examples: tuple[str, ...]

    @property
    def severity(self) -> str:
        """One of STOPS, LEFT_OUT, FILLED_IN and NOTE."""
        return KINDS[self.kind].severity

    def __str__(self) -> str:
        _, what, remedy = KINDS[self.kind]
        shown = ", ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")
        said = f"{what}: {shown}" if shown else what
        return f"  {self.severity:<9} {self.count:>7,}  {said}; {remedy}"


@dataclass
class Report:
    """What was found in a dataset, and what is left of it.

    Attributes:
        json_file: the annotations.
        image_root: what their file names are relative to.
        findings: what is wrong, a kind each.
        content: the dataset without what cannot be used, and with what was missing; its parts are
            empty as far as the file could not be understood.
        given: how many images and annotations the file has.
        keypoints: the names of the keypoints, where they are used.
    """

    json_file: str
    image_root: str
    findings: list[Finding] = field(default_factory=list)
    content: dict[str, Any] = field(
        default_factory=lambda: {"images": [], "annotations": [], "categories": []}
    )
    given: dict[str, int] = field(default_factory=dict)
    keypoints: list[str] = field(default_factory=list)

    def add(
        self, kind: str, entries: Sequence[Any], label: Callable[[Any], str] = str, shown: int = 3
    ) -> None:
        """Take note of the entries that have a problem, if any, naming the first."""
        if entries:
            examples = tuple(label(entry) for entry in entries[:shown])
            self.findings.append(Finding(kind, len(entries), examples))

    @property
    def fatal(self) -> bool:
        """Whether a run must not start."""
        return any(finding.severity == STOPS for finding in self.findings)

    @property
    def changed(self) -> bool:
        """Whether `content` is other than the file."""
        return any(finding.severity in (LEFT_OUT, FILLED_IN) for finding in self.findings)

    @property
    def classes(self) -> list[str]:
        """The names of the categories, by ascending id."""
        categories = sorted(self.content["categories"], key=lambda category: category["id"])
        return [category["name"] for category in categories]

    def _count(self, part: str) -> str:
        left = len(self.content[part])
        given = self.given.get(part, left)
        return f"{left:,} {'' if left == given else f'of {given:,} '}{part}"

    def __str__(self) -> str:
        counts = ", ".join(self._count(part) for part in ("images", "annotations"))
        names = self.classes
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        head = f"{self.json_file} with {self.image_root}: {counts}, {len(names)} classes"
        order = (STOPS, LEFT_OUT, FILLED_IN, NOTE)
        ordered = sorted(self.findings, key=lambda finding: order.index(finding.severity))
        return "\n".join([head + (f" ({shown})" if names else ""), *map(str, ordered)])
