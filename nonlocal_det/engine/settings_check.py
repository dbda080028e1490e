"""Checks of settings that detectron2 reads only after a run has started."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from ..data.dataset_mapper import CheckedDatasetMapper
from ..errors import summarize_error
from ..utils.validation import check_choice, check_int_in

# detectron2's samplers, each with a config key that it needs and not every version has.
_SAMPLERS = {
    "TrainingSampler": "DATALOADER.SAMPLER_TRAIN",
    "RepeatFactorTrainingSampler": "DATALOADER.REPEAT_THRESHOLD",
    "RandomSubsetTrainingSampler": "DATALOADER.RANDOM_SUBSET_RATIO",
    "WeightedTrainingSampler": "DATASETS.TRAIN_REPEAT_FACTOR",
    "WeightedCategoryTrainingSampler": "DATASETS.TRAIN_REPEAT_FACTOR",
}
_MAX_SEED = 2**32 - 1  # numpy's


def check_train_settings(cfg: CfgNode, world_size: int) -> None:
    """Check the seed, the loader, the augmentation and the periods of training.

    Args:
        cfg: Config of the run.
        world_size: Number of processes on all machines.

    Raises:
        ValueError: If a setting is not valid.
    """
    loader = cfg.DATALOADER
    samplers = tuple(name for name, key in _SAMPLERS.items() if _has_key(cfg, key))
    check_choice("DATALOADER.SAMPLER_TRAIN", loader.SAMPLER_TRAIN, samplers)
    check_int_in("DATALOADER.NUM_WORKERS", loader.NUM_WORKERS, 0)
    check_int_in("SOLVER.CHECKPOINT_PERIOD", cfg.SOLVER.CHECKPOINT_PERIOD, 1)
    check_int_in("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD, 0)
    _check_seed("SEED", cfg.SEED, world_size)
    _check_sizes(cfg.INPUT.MIN_SIZE_TRAIN)
    try:
        CheckedDatasetMapper(cfg, is_train=True)
    except Exception as error:
        raise ValueError(
            f"The augmentation of the INPUT settings cannot be built: {summarize_error(error)}."
        ) from error


def check_lazy_train_settings(cfg: DictConfig, world_size: int) -> None:
    """Check the seed, the loader and the periods of training.

    Args:
        cfg: Config of the run.
        world_size: Number of processes on all machines.

    Raises:
        ValueError: If a setting is not valid.
    """
    _check_seed("train.seed", cfg.train.seed, world_size)
    for key, minimum in (
        ("dataloader.train.num_workers", 0),
        ("train.max_iter", 1),
        ("train.checkpointer.period", 1),
        ("train.eval_period", 0),
        ("train.log_period", 1),
    ):
        value = OmegaConf.select(cfg, key)
        if value is not None:  # else the default of what it is an argument of
            check_int_in(key, value, minimum)


def _has_key(cfg: CfgNode, key: str) -> bool:
    node, name = key.split(".")
    return name in cfg[node]


def _check_seed(key: str, seed: int, world_size: int) -> None:
    """Check the seed, to which detectron2 adds the rank; a negative one stands for none."""
    if seed != -1:
        check_int_in(key, seed, min(seed, 0), _MAX_SEED + 1 - world_size)


def _check_sizes(sizes: Sequence[int]) -> None:
    if not sizes:
        raise ValueError(
            "INPUT.MIN_SIZE_TRAIN is empty; it must have at least one length of the shorter side."
        )
    for size in sizes:
        check_int_in("INPUT.MIN_SIZE_TRAIN", size, 0)  # 0 leaves the size
