"""A suite of the small network: which settings of a block are trained on which tasks and seeds.

tasks: [match, far, local]
seeds: [1, 2, 3]
variants:                              # settings of the block, keys of MODEL.NONLOCAL
  none: null                           # no block
  dot product: {PAIRWISE: dot_product}

Results are lines of JSON, each a `Run` with what `small_network.train` returns for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import yaml

from ..modeling.block_factory import build_block
from ..utils.config_files import find_config_file
from ..utils.markdown import markdown_table
from ..utils.validation import check_choice
from .results import Result
from .small_network import TASKS, WIDTH

# Keys of a result.
KEYS = ("task", "variant", "settings", "seed", "accuracy", "learned_at", "entropy")


@dataclass(frozen=True)
class Run:
    """One training: a variant on a task with a seed."""

    task: str
    variant: str
    settings: Optional[Mapping[str, Any]]
    seed: int

    def is_of(self, result: Result) -> bool:
        """Whether a result is this run's: of the same settings, whatever the variant's name."""
        same = (result["task"], result["settings"], result["seed"])
        return same == (self.task, self.settings, self.seed)


@dataclass(frozen=True)
class SmallSuite:
    """Content of a suite's file."""

    tasks: tuple[str, ...]
    variants: Mapping[str, Optional[Mapping[str, Any]]]
    seeds: tuple[int, ...]

    def runs(self) -> list[Run]:
        """All trainings, ordered by seed."""
        return [
            Run(task, variant, settings, seed)
            for seed in self.seeds
            for task in self.tasks
            for variant, settings in self.variants.items()
        ]

    def missing(self, results: Iterable[Result]) -> list[Run]:
        """The trainings that have no result yet."""
        done = list(results)
        return [run for run in self.runs() if not any(run.is_of(result) for result in done)]


def read_small_suite(file: str) -> SmallSuite:
    """Read a suite's file, and build each block once.

    Args:
        file: Path of a suite, or its name in the model zoo, such as "ablation/small_network".

    Raises:
        FileNotFoundError: If the suite does not exist.
        ValueError: If a part is missing or unknown, or a block cannot be built.
    """
    file = find_config_file(file)
    with open(file, encoding="utf-8") as opened:
        content = yaml.safe_load(opened)
    parts = tuple(SmallSuite.__dataclass_fields__)
    if not isinstance(content, dict) or sorted(content) != sorted(parts):
        raise ValueError(f"{file!r} is no suite of the small network; it needs {', '.join(parts)}.")
    for part, kind in (("tasks", list), ("variants", dict), ("seeds", list)):
        if not isinstance(content[part], kind) or not content[part]:
            raise ValueError(
                f"{part!r} of {file!r} is {content[part]!r}; it must be a {kind.__name__} of at "
                f"least one."
            )
    if not all(type(seed) is int for seed in content["seeds"]):
        raise ValueError(f"The seeds of {file!r} are {content['seeds']!r}; they must be integers.")
    for task in content["tasks"]:
        check_choice(f"A task of {file!r}", task, tuple(TASKS))
    for name, settings in content["variants"].items():
        try:
            settings is None or build_block(WIDTH, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The variant {name!r} of {file!r}: {error}") from error
    return SmallSuite(tuple(content["tasks"]), content["variants"], tuple(content["seeds"]))


def tables(suite: SmallSuite, results: Iterable[Result]) -> str:
    """One table per task, in Markdown: how surely and how soon each variant learned it."""
    done = list(results)
    head = ["variant", "accuracy, mean", "lowest", "learned", "median step", "entropy at the start"]
    parts = []
    for task in suite.tasks:
        rows = []
        for variant in suite.variants:
            runs = [run for run in suite.runs() if (run.task, run.variant) == (task, variant)]
            found = [result for result in done if any(run.is_of(result) for run in runs)]
            if found:
                rows.append([variant, *_row(found)])
        parts.append(f"Task: {task}\n\n{markdown_table(head, rows)}")
    return "\n".join(parts)


def _row(results: list[Result]) -> list[str]:
    accuracies = [100 * result["accuracy"] for result in results]
    learned = [result["learned_at"] for result in results if result["learned_at"]]
    entropies = [result["entropy"]["0"] for result in results if "0" in result["entropy"]]
    return [
        f"{statistics.fmean(accuracies):.1f}",
        f"{min(accuracies):.1f}",
        f"{len(learned)} of {len(results)}",
        f"{statistics.median(learned):.0f}" if learned else "",
        f"{statistics.fmean(entropies):.2f}" if entropies else "",
    ]
