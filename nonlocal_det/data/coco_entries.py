"""Predicates and labels for the entries of a COCO annotation file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

Entry = dict[str, Any]  # an image, an annotation or a category


def has_integers(entry: Any, *keys: str) -> bool:
    """Whether an entry is an object with an integer under each key; True is no integer."""
    if not isinstance(entry, dict):
        return False
    for key in keys:
        if type(entry.get(key)) is not int:
            return False
    return True


def is_finite_list(values: Any) -> bool:
    """Whether a value is a list of finite numbers."""
    if not isinstance(values, list):
        return False
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def duplicates(values: Iterable[Any]) -> list[Any]:
    """Return the values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def file_name(image: Entry) -> str:
    """Return the label of an image, its file name."""
    return image["file_name"]


def label(annotation: Entry) -> str:
    """Return the label of an annotation, which has an id."""
    return f"annotation {annotation['id']}"


def excerpt(entry: Any) -> str:
    """Return the beginning of an entry as JSON."""
    text = json.dumps(entry)
    return text if len(text) <= 60 else text[:57] + "..."
