"""A suite: variants of one configuration, trained on several tasks with several seeds.

config: ../mask_rcnn_R50_NL.yaml   # relative to the suite's own file
seeds: [1, 2, 3]
baseline: stock                    # the variant that all others are compared with
tasks:                             # what each changes in the configuration
  coco: {DATASETS.TRAIN: [coco_2017_train]}
variants:
  stock: {MODEL.NONLOCAL.POSITIONS: []}
  one block: {}
pretraining:                       # optional: trainings with seed 1, from whose weights a task can
  detector: {SOLVER.MAX_ITER: 90}  # start with MODEL.WEIGHTS: detector
distances: [0, 64, 128]            # optional: pixels; see `ap_by_distance`
cue_radius: 42                     # optional: radius of a cue around its center, pixels
_BASE_: other.yaml                 # optional: a suite in the same folder with the other parts
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

import yaml

from ..utils.config_files import find_config_file
from ..utils.validation import check_choice

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: a variant on a task with a seed."""

    task: str
    variant: str
    seed: int
    options: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Folder of its output, relative to the suite's."""
        return os.path.join(self.task, self.variant, f"seed{self.seed}").replace(" ", "_")


@dataclass(frozen=True)
class Suite:
    """Content of a suite's file; paths are relative to the working directory, or absolute."""

    file: str
    config: str
    seeds: tuple[int, ...]
    baseline: str
    tasks: Mapping[str, Options]
    variants: Mapping[str, Options]
    distances: tuple[float, ...] = ()
    cue_radius: float = 0
    pretraining: Mapping[str, Options] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """All trainings, ordered by seed: those that are compared with each other run together."""
        return [
            Run(task, variant, seed, self.options(task, variant, seed))
            for seed in self.seeds
            for task in self.tasks
            for variant in self.variants
        ]

    def options(self, task: str, variant: str, seed: int) -> tuple[str, ...]:
        """``KEY VALUE`` pairs, as on the command line of ``nonlocal-det train``."""
        return _options({**self.tasks[task], **self.variants[variant], "SEED": seed})

    def pretraining_of(self, run: Run) -> Optional[Run]:
        """The training whose weights a run starts from, the same for all of its seeds."""
        name = dict(zip(run.options[::2], run.options[1::2])).get("MODEL.WEIGHTS", "")
        if name not in self.pretraining:
            return None
        return Run("pretraining", name, 1, _options({**self.pretraining[name], "SEED": 1}))


def _options(chosen: Options) -> tuple[str, ...]:
    return tuple(text for key, value in chosen.items() for text in (key, str(value)))


def read_suite(file: str) -> Suite:
    """Read a suite's file.

    Args:
        file: Path of a suite, or its name in the model zoo, such as "ablation/lamps".

    Raises:
        FileNotFoundError: If the suite, or the configuration that it names, does not exist.
        ValueError: If a part is missing, unknown, empty or of another type, or if two runs would
            share a folder.
    """
    file = find_config_file(file)
    content = _read_parts(file)
    parts = tuple(name for name in Suite.__dataclass_fields__ if name != "file")
    for name in content:
        check_choice(f"A part of the suite {file!r}", name, parts)
    for name in parts:
        if name not in ("distances", "cue_radius", "pretraining") and not content.get(name):
            raise ValueError(f"The suite {file!r} has no {name!r}.")
    check_choice(f"The baseline of {file!r}", content["baseline"], tuple(content["variants"]))
    config = os.path.join(os.path.dirname(file), content.pop("config"))
    if not os.path.isfile(config):
        raise FileNotFoundError(f"The suite {file!r} names {config!r}, which does not exist.")
    _check_parts(file, content)
    seeds, distances = tuple(content.pop("seeds")), tuple(content.pop("distances", ()))
    suite = Suite(file, os.path.normpath(config), seeds=seeds, distances=distances, **content)
    _check_folders(suite)
    return suite


def _read_parts(file: str) -> dict[str, Any]:
    """Read the parts of a suite, those of its base included."""
    with open(file, encoding="utf-8") as opened:
        content = yaml.safe_load(opened)
    if not isinstance(content, dict):
        raise ValueError(f"{file!r} is not a suite, which has parts such as config and seeds.")
    base = content.pop("_BASE_", None)
    if base is None:
        return content
    base_file = os.path.join(os.path.dirname(file), str(base))
    if not os.path.isfile(base_file):
        raise FileNotFoundError(f"The suite {file!r} names {base_file!r}, which does not exist.")
    return {**_read_parts(base_file), **content}


def _check_parts(file: str, content: Mapping[str, Any]) -> None:
    """Check the types of seeds, tasks and variants, and that names can be folders."""
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not all(type(s) is int and s >= 0 for s in seeds):
        raise ValueError(f"The seeds of {file!r} are {seeds!r}; they must be a list of integers.")
    for part in ("tasks", "variants", "pretraining"):
        for name, options in content.get(part, {}).items():
            if not isinstance(name, str) or "/" in name or name in (".", ".."):
                raise ValueError(
                    f"{name!r} among the {part} of {file!r} cannot name a folder; use text "
                    f"without '/', in quotes if it is a number."
                )
            if not isinstance(options, dict):
                raise ValueError(
                    f"{name!r} among the {part} of {file!r} is {options!r}; it must be the options "
                    f"that it changes, or {{}}."
                )


def _check_folders(suite: Suite) -> None:
    """Check that every run has a folder of its own, on file systems that ignore case too."""
    runs: dict[str, Run] = {}
    for run in suite.runs():
        other = runs.setdefault(run.folder.casefold(), run)
        if other is not run:
            names = " and ".join(f"{(r.task, r.variant, r.seed)}" for r in (other, run))
            raise ValueError(
                f"Two runs of the suite {suite.file!r} would share the folder {run.folder!r}: "
                f"{names} (task, variant, seed). Rename one."
            )
