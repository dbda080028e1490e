"""The pictures of training in an order, and with random draws, that a seed and a place decide.

detectron2 goes on drawing from one random state, of which each loading process has a copy; a run
that is stopped loses all of them. Here what the n-th picture or the n-th step draws depends on
(seed, process, n) alone. So there is no state to save, a run goes on from any iteration as if it
had never stopped, and the number of loading processes changes nothing.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, Optional, Union

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

# What draws: no two uses of a seed may draw the same.
_ORDER, _PICTURE, _STEP = range(3)


def seed_iteration(seed: int, iteration: int) -> None:
    """Let what follows, in this process, draw what belongs to an iteration."""
    _seed(seed, _STEP, comm.get_rank(), iteration)
    torch.cuda.manual_seed_all(torch.initial_seed())


def _seed(*key: int) -> None:
    """Seed Python's, numpy's and torch's draws on the CPU."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(int.from_bytes(words[:2].tobytes(), "little"))


@contextmanager
def _fork_rng_seeded(*key: int) -> Iterator[None]:
    """Draw by a key inside, and go on outside as if nothing had been drawn."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        _seed(*key)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


class ResumableTrainLoader:
    """Batches of this process's pictures, without end.

    Args:
        pictures: indexed by what the sampler gives.
        sampler: without end, and the same each time that it is iterated.
        batch_size: of this process.
        groups: a number for each picture; only pictures of one group share a batch.
        num_workers: processes that load; 0 is this one.
        seed: of all draws.

    Attributes:
        start: the number of the batch, from 0, that the next iteration over this begins with.
    """

    def __init__(
        self,
        pictures: Dataset,
        sampler: Sampler,
        batch_size: int,
        *,
        groups: list[int],
        num_workers: int,
        seed: int,
    ) -> None:
        self._pictures = _PerSampleSeededDataset(pictures, seed)
        self._sampler = sampler
        self._batch_size = batch_size
        self._groups = groups
        self._num_workers = num_workers
        self.start = 0

    def __iter__(self) -> Iterator[list[Any]]:
        # Nothing happens before the first batch is asked for: until then, `start` may change.
        yield from DataLoader(
            self._pictures,
            batch_sampler=itertools.islice(self._batches(), self.start, None),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            # It draws once when it starts: not from what belongs to a step.
            generator=torch.Generator(),
        )

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Places in the order, each with the index of its picture; this costs no loading."""
        waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for place, index in enumerate(self._sampler):
            group = waiting[self._groups[index]]
            group.append((place, index))
            if len(group) == self._batch_size:
                yield list(group)
                group.clear()


class _PerSampleSeededDataset(Dataset):
    """Pictures by (place, index), augmented by draws that belong to the place."""

    def __init__(self, pictures: Dataset, seed: int) -> None:
        self._pictures = pictures
        self._key = (seed, _PICTURE, comm.get_rank())

    def __getitem__(self, where: tuple[int, int]) -> Any:
        place, index = where
        with _fork_rng_seeded(*self._key, place):
            return self._pictures[index]


# detectron2 0.5 has no public name for it.
@configurable(from_config=_train_loader_from_config)
def _build(
    dataset: Union[list[dict[str, Any]], Dataset],
    *,
    mapper: Callable[[dict[str, Any]], Any],
    sampler: Optional[Sampler] = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    seed: int,
) -> Union[ResumableTrainLoader, DataLoader]:
    """As `build_resumable_train_loader`, whose draws it makes."""
    if not isinstance(dataset, list):
        # A dataset that loads by itself may have an order of its own: detectron2's loader.
        return build_detection_train_loader(
            dataset,
            mapper=mapper,
            sampler=sampler,
            total_batch_size=total_batch_size,
            aspect_ratio_grouping=aspect_ratio_grouping,
            num_workers=num_workers,
        )
    batch_size, rest = divmod(total_batch_size, comm.get_world_size())
    assert batch_size and not rest, (total_batch_size, comm.get_world_size())
    return ResumableTrainLoader(
        MapDataset(DatasetFromList(dataset, copy=False), mapper),
        sampler or TrainingSampler(len(dataset), seed=comm.shared_random_seed()),
        batch_size,
        groups=[aspect_ratio_grouping and _is_wide(record) for record in dataset],
        num_workers=num_workers,
        seed=seed,
    )


def build_resumable_train_loader(
    *args: Any, seed: int, **kwargs: Any
) -> Union[ResumableTrainLoader, DataLoader]:
    """Build what detectron2's ``build_detection_train_loader`` builds, in an order of its own.

    Args:
        args: a configuration; or explicit arguments, all as detectron2's.
        seed: of the order and of all draws; the same in all processes.
        kwargs: as ``args``.

    Returns:
        A stream; detectron2's loader where the dataset is no list of records.
    """
    # Samplers draw their seeds, or a subset, when they are made.
    with _fork_rng_seeded(seed, _ORDER):
        return _build(*args, seed=seed, **kwargs)


def _is_wide(record: dict[str, Any]) -> bool:
    if "width" in record:
        return record["width"] > record["height"]
    with PathManager.open(record["file_name"], "rb") as file, Image.open(file) as image:
        return image.width > image.height
