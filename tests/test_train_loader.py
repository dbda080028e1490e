"""Order and augmentation of the samples: they depend only on seed, rank and sample index."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import detectron2.data.samplers as samplers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from PIL import Image
from tool_process import HANG, servers

from nonlocal_det.data.train_loader import (
    ResumableTrainLoader,
    build_resumable_train_loader,
    seed_iteration,
)

# Two of three are wide; category 0 is rare.
RECORDS = [
    {
        "index": index,
        "width": 9 if index % 3 else 5,
        "height": 7,
        "annotations": [{"category_id": int(index > 1)}],
    }
    for index in range(20)
]


def sample(record: dict[str, Any]) -> tuple[int, float, float, float]:
    """A mapper that returns the image's index, and a random number of each generator."""
    return record["index"], random.random(), np.random.rand(), torch.rand(1).item()


def loader(**options: Any) -> ResumableTrainLoader:
    return build_resumable_train_loader(
        RECORDS, **{"mapper": sample, "total_batch_size": 2, "seed": 3, **options}
    )


def batches(source: ResumableTrainLoader, count: int, start: int = 0) -> list[Any]:
    source.start_batch = start
    return list(itertools.islice(source, count))


@pytest.mark.parametrize("grouping", [True, False])
def test_any_start_and_any_number_of_workers_give_the_same(grouping: bool) -> None:
    expected = batches(loader(aspect_ratio_grouping=grouping), 50)
    for start, workers in [(0, 0), (0, 2), (23, 0), (23, 3), (49, 1)]:
        resumed = loader(aspect_ratio_grouping=grouping, num_workers=workers)
        assert batches(resumed, 50 - start, start) == expected[start:]


def test_another_seed_gives_another_order_and_augmentation() -> None:
    first, second = batches(loader(), 10), batches(loader(seed=4), 10)
    assert [[image[0] for image in batch] for batch in first] != [
        [image[0] for image in batch] for batch in second
    ]
    assert not {p[1:] for batch in first for p in batch} & {p[1:] for b in second for p in b}


def test_every_sample_has_random_numbers_of_its_own() -> None:
    images = [image for batch in batches(loader(), 50) for image in batch]
    for kind in (1, 2, 3):
        assert len({image[kind] for image in images}) == 100


def test_every_image_comes_once_per_epoch() -> None:
    order = [p[0] for batch in batches(loader(aspect_ratio_grouping=False), 50) for p in batch]
    for first in range(0, 100, 20):
        assert sorted(order[first : first + 20]) == list(range(20))
    assert order[:20] != order[20:40]


def test_a_batch_is_wide_or_high() -> None:
    for batch in batches(loader(aspect_ratio_grouping=True), 50):
        assert len({image[0] % 3 == 0 for image in batch}) == 1


def test_records_without_a_size_are_measured(tmp_path: Path) -> None:
    records = []
    for index in range(20):
        path = tmp_path / f"{index}.png"
        Image.new("L", (9 if index % 3 else 5, 7)).save(path)
        records.append({"index": index, "file_name": str(path)})
    measured = build_resumable_train_loader(records, mapper=sample, total_batch_size=2, seed=3)
    assert batches(measured, 30) == batches(loader(), 30)


def test_the_loader_leaves_other_random_numbers_unchanged() -> None:
    def numbers(between: Any) -> list[float]:
        seed_iteration(1, 2)
        first = [random.random(), np.random.rand(), torch.rand(1).item()]
        between()
        return [*first, random.random(), np.random.rand(), torch.rand(1).item()]

    assert numbers(lambda: batches(loader(num_workers=2), 2)) == numbers(lambda: None)
    assert numbers(lambda: batches(loader(), 2)) == numbers(lambda: None)


def test_random_numbers_of_an_iteration_depend_on_it() -> None:
    def numbers(seed: int, iteration: int) -> tuple[float, float, float]:
        seed_iteration(seed, iteration)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert numbers(1, 5) == numbers(1, 5)
    assert len({numbers(seed, iteration) for seed in range(3) for iteration in range(3)}) == 9


NAMES = [
    name
    for name in ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")
    if hasattr(samplers, name)  # detectron2 0.5 lacks the last
]


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_of_detectron2_resumes(name: str) -> None:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("records",)
    cfg.DATALOADER.SAMPLER_TRAIN = name
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    if "RandomSubset" in name:
        cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 4
    DatasetCatalog.pop("records", None)
    DatasetCatalog.register("records", lambda: list(RECORDS))
    np.random.seed(None)  # another run's state

    def build(seed: int = 3) -> ResumableTrainLoader:
        return build_resumable_train_loader(cfg, mapper=sample, seed=seed)

    expected = batches(build(), 40)
    assert batches(build(), 20, 20) == expected[20:]
    order = [image[0] for batch in expected for image in batch]
    assert [image[0] for batch in batches(build(4), 40) for image in batch] != order
    cfg.SEED = 7  # official detectron2 gives it to its samplers
    assert batches(build(), 40) == expected
    seen = Counter(image[0] for batch in expected for image in batch)
    if "RepeatFactor" in name:
        assert min(seen[0], seen[1]) > 1.5 * max(seen[i] for i in range(2, 20))
    else:
        assert len(seen) == (10 if "RandomSubset" in name else 20)


def take(rank: int, folder: str) -> None:
    """Save the batches of one of two ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for start in (0, 3):
        taken = batches(loader(total_batch_size=4, aspect_ratio_grouping=False), 5 - start, start)
        torch.save(taken, f"{folder}/{rank}-{start}")
    dist.destroy_process_group()


def test_two_ranks_share_the_images_and_augment_differently(tmp_path: Path) -> None:
    processes = [servers.Process(target=take, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}-0") for rank in (0, 1))
    assert sorted(p[0] for batch in first + second for p in batch) == list(range(20))
    assert not {p[1] for batch in first for p in batch} & {p[1] for b in second for p in b}
    for rank, expected in ((0, first), (1, second)):
        assert torch.load(tmp_path / f"{rank}-3") == expected[3:]
