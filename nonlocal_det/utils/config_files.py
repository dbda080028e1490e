"""The configuration files that come with the package: their names, and where they are."""

from __future__ import annotations

import difflib
import os
from typing import Optional

# In a checkout a link to its configs/, in an installed package a copy of it.
_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "model_zoo")
ZOO_FOLDER = os.path.join(_FOLDER, "configs")
_SUFFIXES = (".yaml", ".py")


def zoo_names() -> list[str]:
    """Paths of the model zoo's configuration files, relative to its folder, sorted."""
    return sorted(
        os.path.relpath(os.path.join(folder, file), ZOO_FOLDER).replace(os.sep, "/")
        for folder, _, files in os.walk(ZOO_FOLDER)
        for file in files
        if file.endswith(_SUFFIXES)
    )


def find_in_zoo(name: str) -> Optional[str]:
    """Path of the file that has this name in the model zoo, or None.

    Args:
        name: Path relative to the zoo's folder, with or without ".yaml" or ".py".
    """
    known = zoo_names()
    found = next((n for n in (name, *(name + end for end in _SUFFIXES)) if n in known), None)
    return os.path.join(ZOO_FOLDER, found) if found else None


def nearest_in_zoo(name: str) -> str:
    """The up to three names of the model zoo that are most like ``name``, as one phrase."""
    stem = os.path.basename(os.path.splitext(name)[0])
    stems = {n: os.path.basename(os.path.splitext(n)[0]) for n in zoo_names()}
    ranked = sorted(
        stems, key=lambda n: difflib.SequenceMatcher(None, stem, stems[n]).ratio(), reverse=True
    )
    return ", ".join(ranked[:3])


def find_config_file(path_or_name: str) -> str:
    """Path of a configuration file that is given by its path or by its name in the model zoo.

    Raises:
        FileNotFoundError: If there is neither, with the nearest names of the zoo.
    """
    found = path_or_name if os.path.isfile(path_or_name) else find_in_zoo(path_or_name)
    if found is None:
        raise FileNotFoundError(
            f"There is no configuration file {path_or_name!r}. The model zoo's nearest are "
            f"{nearest_in_zoo(path_or_name)}."
        )
    return found
