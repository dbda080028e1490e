"""From the command line to a run that has started: config, checks, output directory and log."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from typing import Any, NamedTuple, Optional

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from omegaconf import DictConfig

from ..config import load_config, load_lazy_config
from ..utils.config_files import find_config_file
from ..utils.deprecation import RenamedOption
from .custom_data import CustomDatasets, add_dataset_options, load_custom_datasets
from .launch import resolve_device, world_size_of
from .output_dir import lock_output_dir
from .preflight import preflight_check, preflight_check_lazy
from .resume_check import changed_settings
from .run_info import append_run_info, choose_seed


class CheckedCfg(NamedTuple):
    """A config with which a run can start.

    Attributes:
        cfg: Config of either kind.
        device: Device to run on, which may be "cpu" where the config says "cuda".
        datasets: Datasets given on the command line.
    """

    cfg: Any
    device: str
    datasets: CustomDatasets = CustomDatasets()


def nonlocal_argument_parser(epilog: Optional[str] = None) -> ArgumentParser:
    """Create a parser of detectron2's standard flags and of those for custom datasets.

    Args:
        epilog: Text below the list of flags in ``--help``.
    """
    parser = default_argument_parser(epilog)
    add_dataset_options(parser)
    check_data = parser.add_argument(
        "--check-data",
        action="store_true",
        help="only report all issues of the custom datasets, or of the config's datasets",
    )
    parser.add_argument("--check", action=RenamedOption, renamed=check_data)
    return parser


def setup(args: Namespace) -> CfgNode:
    """Load and check a YAML config, and start the run.

    Args:
        args: Parsed flags, of detectron2's parser or of `nonlocal_argument_parser`.

    Returns:
        Frozen config with device and seed.

    Raises:
        OSError: If a file or directory is missing or not usable.
        ValueError: If anything else prevents the run; see `load_and_check_cfg`.
    """
    cfg, device, datasets = load_and_check_cfg(args)
    fell_back_to_cpu = device != cfg.MODEL.DEVICE
    cfg.MODEL.DEVICE = device
    if not args.eval_only:
        lock_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    cfg.SEED = choose_seed(cfg.SEED, cfg.OUTPUT_DIR, args)
    cfg.freeze()
    changed = changed_settings(cfg) if args.resume and not args.eval_only else []
    start_run(cfg, args, cfg.OUTPUT_DIR, cfg.SEED, fell_back_to_cpu=fell_back_to_cpu)
    if changed:
        logging.getLogger("detectron2").warning(
            f"Settings that differ from those of the run that is resumed: {', '.join(changed)}. "
            f"The optimizer's, such as learning rates, stay those of the checkpoint."
        )
    datasets.write_and_log(cfg)
    return cfg


def load_and_check_cfg(args: Namespace) -> CheckedCfg:
    """Load a YAML config and check everything that would stop the run; nothing is written.

    Args:
        args: Parsed flags.

    Raises:
        OSError: If the config, a dataset or weights are missing, or the output directory is not
            writable.
        ValueError: If a key, a value, a position or a dataset name does not exist; a dataset, the
            model or the weights are not usable; the batch cannot be divided; or the processes
            cannot be started.
    """
    cfg = load_config(args.config_file, args.opts)
    world_size = world_size_of(args)
    device = resolve_device(cfg.MODEL.DEVICE, "MODEL.DEVICE cpu", args)
    datasets = load_custom_datasets(cfg, args)
    datasets.apply_to(cfg)
    preflight_check(
        cfg,
        device,
        world_size,
        eval_only=args.eval_only,
        resume=args.resume,
        valid_datasets=tuple(datasets.sources),
    )
    return CheckedCfg(cfg, device, datasets)


def device_of(args: Namespace) -> str:
    """Return the device of a YAML config's run, without the checks of `load_and_check_cfg`.

    Args:
        args: Parsed flags.

    Raises:
        OSError: If the config is missing.
        ValueError: If the config is not valid, or the processes cannot be started.
    """
    cfg = load_config(args.config_file, args.opts)
    return resolve_device(cfg.MODEL.DEVICE, "MODEL.DEVICE cpu", args)


def setup_lazy(args: Namespace) -> DictConfig:
    """Load and check a LazyConfig, and start the run.

    Args:
        args: Parsed flags of detectron2's parser.

    Returns:
        Config with device and seed.

    Raises:
        OSError: If a file or directory is missing or not usable.
        ValueError: If anything else prevents the run; see `load_and_check_lazy_cfg`.
    """
    cfg, device, _ = load_and_check_lazy_cfg(args)
    train = cfg.train
    fell_back_to_cpu = device != train.device
    train.device = device
    if not args.eval_only:
        lock_output_dir(train.output_dir, "train.output_dir")
    train.seed = choose_seed(train.seed, train.output_dir, args)
    start_run(cfg, args, train.output_dir, train.seed, fell_back_to_cpu=fell_back_to_cpu)
    return cfg


def load_and_check_lazy_cfg(args: Namespace) -> CheckedCfg:
    """Load a LazyConfig and check everything that would stop the run; nothing is written.

    Args:
        args: Parsed flags.

    Raises:
        OSError: If the config, a dataset or weights are missing, or the output directory is not
            usable.
        ValueError: If an override cannot be parsed, a dataset name does not exist, a setting, the
            model or the weights are not usable, the batch cannot be divided, or the processes
            cannot be started.
    """
    cfg = load_lazy_config(args.config_file, args.opts)
    device = resolve_device(cfg.train.device, "train.device=cpu", args)
    flags = {"eval_only": args.eval_only, "resume": args.resume}
    preflight_check_lazy(cfg, device, world_size_of(args), **flags)
    return CheckedCfg(cfg, device)


def start_run(
    cfg: Any, args: Namespace, output_dir: str, seed: int, *, fell_back_to_cpu: bool
) -> None:
    """Create the output directory, start detectron2's log, and append to ``run.json``.

    Args:
        cfg: Final config of either kind; ``config.yaml`` is written from it.
        args: Parsed flags.
        output_dir: Output directory of the run.
        seed: Seed of all random numbers.
        fell_back_to_cpu: Whether the run is on the CPU for lack of a GPU.
    """
    # detectron2 logs the content of the config file, which may be given by its name in the zoo.
    args.config_file = find_config_file(args.config_file)
    default_setup(cfg, args)
    if not args.eval_only:
        append_run_info(output_dir, seed=seed, resume=args.resume)
    if fell_back_to_cpu:
        logging.getLogger("detectron2").info("No GPU was found: this runs on the CPU.")
