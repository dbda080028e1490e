"""Names of the files that the figures, pages and videos of input files are written to."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

from ...utils.outputs import CommandOutputs
from .image_io import is_video

INFLUENCE_EXTENSION = "influence.png"


def output_extensions(
    path: str, formats: Sequence[str], html: bool, influence: bool = False
) -> list[str]:
    """Extensions of the files that `AttentionVisualizer.visualize` writes for an input file."""
    if is_video(path):
        return ["mp4"]
    return [*formats, *["html"] * html, *[INFLUENCE_EXTENSION] * influence]


def free_output_stems(
    paths: Sequence[str],
    folder: str,
    outputs: CommandOutputs,
    *,
    formats: Sequence[str] = ("png",),
    html: bool = False,
    influence: bool = False,
) -> list[str]:
    """Choose file names without extension for the output of each input file.

    Input files, and files that are no earlier output, keep their names.

    Args:
        paths: Input files.
        folder: Output folder.
        outputs: Output files of the command.
        formats: As of `AttentionVisualizer.visualize`.
        html: As of `AttentionVisualizer.visualize`.
        influence: As of `AttentionVisualizer`.

    Returns:
        A different name for each file: "photo", "photo-2", ...
    """
    taken = {os.path.realpath(path) for path in paths}
    stems = []
    for path in paths:
        base = os.path.splitext(os.path.basename(path))[0]
        for stem in (base if number == 1 else f"{base}-{number}" for number in itertools.count(1)):
            names = [f"{stem}.{end}" for end in output_extensions(path, formats, html, influence)]
            files = [os.path.join(os.path.realpath(folder), name) for name in names]
            # Also a stem in use for other extensions: outputs of one input share one of their own.
            if stem not in stems and taken.isdisjoint(files) and all(map(outputs.may_write, files)):
                break
        stems.append(stem)
    return stems
