"""Resumable training data loader.

Order and augmentation of the n-th sample depend only on (seed, rank, n). detectron2 samples from
one random state, of which each DataLoader worker has a copy, and a stopped run loses them all.
Here there is no state to save: a run resumes at any iteration as if it had never stopped, and the
number of workers changes nothing.
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
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

# Purposes of random numbers: no two uses of a seed may share them.
_ORDER, _AUGMENTATION, _ITERATION = range(3)


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed all random number generators of this process for one training iteration.

    Args:
        seed: Seed of the run, the same on all ranks.
        iteration: Index of the iteration.
    """
    _seed(seed, _ITERATION, comm.get_rank(), iteration)
    torch.cuda.manual_seed_all(torch.initial_seed())


def _seed(*key: int) -> None:
    """Seed the CPU random number generators of Python, numpy and torch."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(int.from_bytes(words[:2].tobytes(), "little"))


@contextmanager
def _fork_rng_seeded(*key: int) -> Iterator[None]:
    """Seed the CPU random number generators within the body, and restore their state after it."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        _seed(*key)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


class ResumableTrainLoader:
    """Infinite iterable over this rank's batches, which can start at any batch.

    Args:
        dataset: Map-style dataset, indexed by what the sampler yields.
        sampler: Infinite sampler that yields the same indices whenever it is iterated.
        batch_size: Number of images per batch on this rank.
        groups: Aspect-ratio group of each image; only images of one group share a batch.
        num_workers: Number of DataLoader workers; 0 loads in this process.
        seed: Seed of the augmentation, the same on all ranks.

    Attributes:
        start_batch: Index of the batch that the next iteration over this loader starts with.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        batch_size: int,
        *,
        groups: list[int],
        num_workers: int,
        seed: int,
    ) -> None:
        self._dataset = _PerSampleSeededDataset(dataset, seed)
        self._sampler = sampler
        self._batch_size = batch_size
        self._groups = groups
        self._num_workers = num_workers
        self.start_batch = 0

    def __iter__(self) -> Iterator[list[Any]]:
        # A generator: until the first batch is requested, `start_batch` may still change.
        yield from DataLoader(
            self._dataset,
            batch_sampler=itertools.islice(self._batches(), self.start_batch, None),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            # It samples a base seed when it starts; not from the generators of an iteration.
            generator=torch.Generator(),
        )

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield batches of (sample index, image index); no image is loaded for it."""
        incomplete: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for sample, index in enumerate(self._sampler):
            group = incomplete[self._groups[index]]
            group.append((sample, index))
            if len(group) == self._batch_size:
                yield list(group)
                group.clear()


class _PerSampleSeededDataset(Dataset):
    """A dataset indexed by (sample index, image index), augmented by the seed of the sample."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset = dataset
        self._key = (seed, _AUGMENTATION, comm.get_rank())

    def __getitem__(self, sample_and_index: tuple[int, int]) -> Any:
        sample, index = sample_and_index
        with _fork_rng_seeded(*self._key, sample):
            return self._dataset[index]


def _from_config(
    cfg: CfgNode,
    mapper: Optional[Callable[[dict[str, Any]], Any]] = None,
    *,
    dataset: Any = None,
    sampler: Optional[Sampler] = None,
) -> dict[str, Any]:
    """The arguments of `_build` that detectron2 takes from a config."""
    seed = comm.shared_random_seed()
    # detectron2 0.5 has no public name for it.
    arguments = _train_loader_from_config(cfg, mapper, dataset=dataset, sampler=sampler)
    if sampler is None and hasattr(arguments["sampler"], "_seed"):
        # One detectron2 seeds it with the config's seed (-1: the same order in every run), another
        # with a random number.
        arguments["sampler"]._seed = seed
    return arguments


@configurable(from_config=_from_config)
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
    """Build the loader with the random number generators as they are."""
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
        groups=[aspect_ratio_grouping and _is_wide(dataset_dict) for dataset_dict in dataset],
        num_workers=num_workers,
        seed=seed,
    )


def build_resumable_train_loader(
    *args: Any, seed: int, **kwargs: Any
) -> Union[ResumableTrainLoader, DataLoader]:
    """Build a loader like detectron2's ``build_detection_train_loader``, but resumable.

    Args:
        args: Config, or explicit arguments, as for detectron2's function.
        seed: Seed of order and augmentation, the same on all ranks.
        kwargs: Keyword arguments, as for detectron2's function.

    Returns:
        A resumable loader; or detectron2's loader, if the dataset is not a list of dicts.
    """
    # Some samplers choose a seed, or a subset, when they are constructed.
    with _fork_rng_seeded(seed, _ORDER):
        return _build(*args, seed=seed, **kwargs)


def _is_wide(dataset_dict: dict[str, Any]) -> bool:
    if "width" in dataset_dict:
        return dataset_dict["width"] > dataset_dict["height"]
    with PathManager.open(dataset_dict["file_name"], "rb") as file, Image.open(file) as image:
        return image.width > image.height
