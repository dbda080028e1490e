"""What comes before a run: its configuration, checked, and wrong input said in one sentence."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..layers.base import check_count, choose
from ..modeling.places import check_positions
from .record import add_to_record, choose_seed

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@contextmanager
def one_sentence_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with what a wrong input raised, as one sentence, and exit code 1.

    Args:
        kinds: of errors that speak for themselves; by default ValueError and OSError.
    """
    expected = kinds or (ValueError, OSError)
    try:
        yield
    except expected as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")


def setup(args: Namespace) -> CfgNode:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        FileNotFoundError, ValueError: as `checked_config`; also a ValueError for a record of
            earlier starts that cannot be read.
    """
    cfg, device = checked_config(args)
    asked, cfg.MODEL.DEVICE = cfg.MODEL.DEVICE, device
    if not args.eval_only:
        cfg.SEED = choose_seed(cfg.SEED, cfg.OUTPUT_DIR, args.resume)
    cfg.freeze()
    default_setup(cfg, args)
    if not args.eval_only:
        add_to_record(cfg.OUTPUT_DIR, seed=cfg.SEED, resume=args.resume)
    say_device(asked, device)
    return cfg


def checked_config(args: Namespace) -> tuple[CfgNode, str]:
    """The configuration, and the device that it is to run on; nothing is written.

    Raises:
        FileNotFoundError: for a missing configuration or dataset.
        ValueError: for a key, a value, a position or a dataset name that does not exist; for a
            batch that cannot be divided; for processes that cannot be started.
    """
    cfg = load_config(args.config_file, args.opts)
    check_positions(cfg)
    for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        check_dataset(name)
    device = device_of(cfg.MODEL.DEVICE, "MODEL.DEVICE cpu", args)
    solver = cfg.SOLVER
    if solver.AMP.ENABLED:
        mixed_precision("SOLVER.AMP.DTYPE", solver.AMP.DTYPE, device)
    if not args.eval_only:
        pictures = DefaultTrainer.auto_scale_workers(cfg, process_count(args)).SOLVER.IMS_PER_BATCH
        passes = {"SOLVER.ACCUMULATION_STEPS": solver.ACCUMULATION_STEPS}
        check_batch({"SOLVER.IMS_PER_BATCH": pictures}, passes, process_count(args))
    return cfg, device


def local_process_count(args: Namespace) -> int:
    """Processes on this machine, by torchrun or by detectron2's flags."""
    if dist.is_torchelastic_launched():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return max(args.num_gpus, 1)


def process_count(args: Namespace) -> int:
    """Processes on all machines."""
    if dist.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"])
    return local_process_count(args) * args.num_machines


def device_of(asked: str, on_cpu: str, args: Namespace) -> str:
    """The device asked for; or "cpu", where that is "cuda", one process is to run, and no GPU is.

    Args:
        asked: "cuda", "cpu" or another that torch knows.
        on_cpu: how to ask for "cpu", for the message.
        args: detectron2's standard arguments.

    Raises:
        ValueError: if GPUs are asked for and there are too few, or if machines cannot meet.
    """
    _check_machines(args)
    count, gpus = local_process_count(args), torch.cuda.device_count()
    by_torchrun = dist.is_torchelastic_launched()
    if asked != "cuda" or gpus >= count:
        return asked
    if gpus == 0 and (by_torchrun or count == 1):
        return "cpu"
    flag = "--nproc_per_node" if by_torchrun else "--num-gpus"
    raise ValueError(
        f"{flag} {count} asks for {count} GPUs on this machine, which has {gpus or 'none'}: write "
        f"{flag} {max(gpus, 1)}, or add {on_cpu} for {count} processes on CPUs."
    )


def _check_machines(args: Namespace) -> None:
    if dist.is_torchelastic_launched() or args.num_machines == 1:
        return
    if args.machine_rank not in range(args.num_machines):
        raise ValueError(
            f"--machine-rank is {args.machine_rank}; of {args.num_machines} machines it must be "
            f"one of 0 to {args.num_machines - 1}."
        )
    if args.dist_url in ("auto", default_argument_parser().get_default("dist_url")):
        raise ValueError(
            f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, with a free "
            f"port of the machine of rank 0, and the same on all machines."
        )


def check_batch(pictures: dict[str, int], passes: dict[str, int], processes: int) -> None:
    """See that a step's pictures can be divided between processes and their passes.

    Args:
        pictures: their number, under its key.
        passes: the number of each process's passes, under its key.
        processes: on all machines.

    Raises:
        ValueError: with the numbers, if not.
    """
    (key, total), (pass_key, each) = *pictures.items(), *passes.items()
    check_count(pass_key, each)
    if total % (processes * each):
        raise ValueError(
            f"{key} is {total}; it must be a multiple of {processes * each}, the number of "
            f"processes, {processes}, times {pass_key}, {each}."
        )


def mixed_precision(key: str, name: str, device: str) -> torch.dtype:
    """The dtype of that name; the key under which it was given is for the message.

    Raises:
        ValueError: if it is no choice, or cannot be trained in on that device.
    """
    choose(key, name, tuple(PRECISIONS))
    if device == "cpu" and name == "float16":
        raise ValueError(f"{key} is 'float16', which needs a GPU; on a CPU it must be 'bfloat16'.")
    return PRECISIONS[name]


def say_device(asked: str, device: str) -> None:
    """Log that it is another device than asked for."""
    if asked != device:
        logging.getLogger("detectron2").info("No GPU was found: this runs on the CPU.")


def check_dataset(name: str) -> None:
    """See that a dataset is registered and its files are there.

    Raises:
        ValueError: if no dataset has that name.
        FileNotFoundError: with the file or folder that is missing.
    """
    if name not in DatasetCatalog.list():
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=4, cutoff=0.4)
        raise ValueError(f"There is no dataset {name!r}. The nearest names are {', '.join(near)}.")
    metadata = MetadataCatalog.get(name)
    for key in ("json_file", "image_root"):
        path = metadata.get(key)
        if path and not os.path.exists(PathManager.get_local_path(path)):
            raise FileNotFoundError(
                f"Dataset {name!r} needs {path!r}, which does not exist. The folder that holds all "
                f"datasets is given by the environment variable DETECTRON2_DATASETS, now "
                f"{os.environ.get('DETECTRON2_DATASETS', 'datasets')!r}."
            )
