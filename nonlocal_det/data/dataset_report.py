"""The report on a dataset in COCO format: its issues, and what remains usable."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .issue_types import ERROR, FIXED, ISSUE_TYPES, REMOVED, SEVERITIES


@dataclass(frozen=True)
class Issue:
    """All occurrences of one type of issue in a dataset.

    Attributes:
        type: Key of `ISSUE_TYPES`.
        count: Number of occurrences.
        examples: Labels of the first occurrences.
    """

    type: str
    count: int
    examples: tuple[str, ...]

    @property
    def severity(self) -> str:
        """The severity of the issue, one of `SEVERITIES`."""
        return ISSUE_TYPES[self.type].severity

    def __str__(self) -> str:
        severity, message, hint = ISSUE_TYPES[self.type]
        shown = ", ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")
        text = f"{message}: {shown}" if shown else message
        return f"  {severity:<7} {self.count:>7,}  {text}; {hint}"


@dataclass
class DatasetReport:
    """The issues of a dataset, and the dataset as it would be used.

    Attributes:
        json_file: Path of the COCO annotation file.
        image_root: Directory that file names in it are relative to.
        issues: Issues found, one of each type.
        dataset: Content of the file without removed entries and with fixed values. Its lists are
            empty where the file could not be understood.
        num_in_file: Number of "images" and "annotations" in the file.
        keypoints: Names of the keypoints, if the model predicts keypoints.
    """

    json_file: str
    image_root: str
    issues: list[Issue] = field(default_factory=list)
    dataset: dict[str, Any] = field(
        default_factory=lambda: {"images": [], "annotations": [], "categories": []}
    )
    num_in_file: dict[str, int] = field(default_factory=dict)
    keypoints: list[str] = field(default_factory=list)

    def add(
        self,
        issue_type: str,
        entries: Sequence[Any],
        label: Callable[[Any], str] = str,
        max_examples: int = 3,
    ) -> None:
        """Add an issue, if any entry has it.

        Args:
            issue_type: Key of `ISSUE_TYPES`.
            entries: Entries that have the issue.
            label: Function that returns the text by which to name an entry.
            max_examples: Maximum number of entries to name.
        """
        if entries:
            examples = tuple(label(entry) for entry in entries[:max_examples])
            self.issues.append(Issue(issue_type, len(entries), examples))

    @property
    def has_errors(self) -> bool:
        """Whether an issue prevents training and evaluation."""
        return any(issue.severity == ERROR for issue in self.issues)

    @property
    def is_modified(self) -> bool:
        """Whether `dataset` differs from the file."""
        return any(issue.severity in (REMOVED, FIXED) for issue in self.issues)

    @property
    def classes(self) -> list[str]:
        """Names of the categories, by ascending id."""
        categories = sorted(self.dataset["categories"], key=lambda category: category["id"])
        return [category["name"] for category in categories]

    def _count(self, part: str) -> str:
        used = len(self.dataset[part])
        in_file = self.num_in_file.get(part, used)
        return f"{used:,} {'' if used == in_file else f'of {in_file:,} '}{part}"

    def __str__(self) -> str:
        counts = ", ".join(self._count(part) for part in ("images", "annotations"))
        names = self.classes
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        head = f"{self.json_file} with {self.image_root}: {counts}, {len(names)} classes"
        ordered = sorted(self.issues, key=lambda issue: SEVERITIES.index(issue.severity))
        return "\n".join([head + (f" ({shown})" if names else ""), *map(str, ordered)])


def print_reports(reports: Iterable[DatasetReport]) -> None:
    """Print reports; characters that the terminal cannot show are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(map(str, reports))
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def compare_splits(train: DatasetReport, val: DatasetReport, *, renumber: bool = True) -> None:
    """Add issues between training and validation set to the report on the validation set.

    Args:
        train: Report on the training set.
        val: Report on the validation set, which is changed.
        renumber: Whether categories in another order are renumbered.
    """
    match_classes(val, train.classes, train.keypoints, "training set", renumber=renumber)
    if _has_masks(train) and val.dataset["annotations"] and not _has_masks(val):
        val.add("only_boxes", [""])
    in_train = {_absolute_path(train, image) for image in train.dataset["images"]}
    shared = [image for image in val.dataset["images"] if _absolute_path(val, image) in in_train]
    val.add("shared_image", shared, lambda image: image["file_name"])


def match_classes(
    report: DatasetReport, classes: list[str], keypoints: list[str], source: str, *, renumber: bool
) -> None:
    """Number the categories of a dataset as others are, or add an issue if they are not the same.

    Args:
        report: Report on the dataset, which is changed.
        classes: Names of the other classes, in order; empty if unknown.
        keypoints: Names of the other keypoints, in order; empty if unknown.
        source: What has them, such as "training set".
        renumber: Whether categories in another order are renumbered.
    """
    if classes and report.classes and classes != report.classes:
        same = sorted(classes) == sorted(report.classes) and len(set(classes)) == len(classes)
        if same and renumber:
            _renumber(report, classes)
            report.add("other_order", report.classes, max_examples=5)
        else:
            report.add("other_categories", [_difference(classes, report.classes, source)])
    if keypoints and report.keypoints and keypoints != report.keypoints:
        difference = _difference(keypoints, report.keypoints, source)
        report.add("other_categories", [f"keypoints: {difference}"])


def _renumber(report: DatasetReport, classes: list[str]) -> None:
    """Exchange the ids of the categories, so that ascending ids give the classes in this order."""
    ids = sorted(category["id"] for category in report.dataset["categories"])
    new_ids = {c["id"]: ids[classes.index(c["name"])] for c in report.dataset["categories"]}
    for category in report.dataset["categories"]:
        category["id"] = new_ids[category["id"]]
    for annotation in report.dataset["annotations"]:
        old = annotation["category_id"]
        annotation["category_id"] = new_ids.get(old, old)  # one may be undeclared, an error


def _difference(theirs: list[str], ours: list[str], source: str) -> str:
    for names, others, owner in ((theirs, ours, source), (ours, theirs, "file")):
        only = [name for name in names if name not in others]
        if only:
            return f"only the {owner} has {', '.join(only[:5])}{', ...' if len(only) > 5 else ''}"
    return f"the order is {', '.join(theirs[:5])} in the {source}, {', '.join(ours[:5])} here"


def _has_masks(report: DatasetReport) -> bool:
    return any(annotation.get("segmentation") for annotation in report.dataset["annotations"])


def _absolute_path(report: DatasetReport, image: dict[str, Any]) -> str:
    return os.path.abspath(os.path.join(report.image_root, image["file_name"]))
