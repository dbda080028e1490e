"""Many processes: started by torchrun or by detectron2's flags, joined by NCCL or by gloo."""

from __future__ import annotations

import os
import socket
import sys
from argparse import Namespace
from typing import Any, Callable, NamedTuple

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from detectron2.engine import DEFAULT_TIMEOUT, TrainerBase, default_argument_parser
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import EvalHook

from ..errors import exit_on_error
from ..modeling.sync_batchnorm import convert_sync_batchnorm_for_cpu


def local_world_size_of(args: Namespace) -> int:
    """Processes on this machine, by torchrun or by detectron2's flags."""
    if dist.is_torchelastic_launched():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return max(args.num_gpus, 1)


def world_size_of(args: Namespace) -> int:
    """Processes on all machines."""
    if dist.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"])
    return local_world_size_of(args) * args.num_machines


def resolve_device(asked: str, on_cpu: str, args: Namespace) -> str:
    """The device asked for; or "cpu", where that is "cuda", one process is to run, and no GPU is.

    Args:
        asked: "cuda", "cpu" or another that torch knows.
        on_cpu: how to ask for "cpu", for the message.
        args: detectron2's standard arguments.

    Raises:
        ValueError: if GPUs are asked for and there are too few, or if machines cannot meet.
    """
    _check_machines(args)
    count, gpus = local_world_size_of(args), torch.cuda.device_count()
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


class _Group(NamedTuple):
    """Where the processes of one machine meet all others."""

    url: str
    size: int  # processes on all machines
    local_size: int  # processes on this machine
    first: int  # the rank of this machine's first process


def launch(main: Callable[[Namespace], Any], args: Namespace, device: Callable[[], str]) -> Any:
    """Call ``main(args)`` in every process that torchrun, or else detectron2's flags, ask for.

    Under torchrun this process is one of them already. Otherwise ``--num-gpus`` processes start
    here, and when one of them fails the others are ended.

    Args:
        main: of a script's top level, since new processes import it.
        args: detectron2's standard arguments.
        device: gives that of all processes: "cuda", with a GPU for each of this machine, or "cpu".
            It is called before any other process starts, so that one alone says what is wrong with
            the arguments. A single process is left to ``main``.

    Returns:
        What ``main`` returns, where it runs in this process.
    """
    size, here = world_size_of(args), local_world_size_of(args)
    by_torchrun = dist.is_torchelastic_launched()
    if size == 1 and not by_torchrun:
        return main(args)
    with exit_on_error():
        name = device()
    if by_torchrun:
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        group = _Group("env://", size, here, rank - local_rank)
        return _process(local_rank, group, name, main, args)
    group = _Group(_url(args), size, here, args.machine_rank * here)
    try:
        mp.spawn(_process, (group, name, main, args), nprocs=here)
    except mp.ProcessExitedException as error:
        # A process that ends with 1 has said why.
        sys.exit(1 if error.exit_code == 1 else str(error))


def _url(args: Namespace) -> str:
    if args.dist_url != "auto":
        return args.dist_url
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def _process(
    local_rank: int,
    group: _Group,
    device: str,
    main: Callable[[Namespace], Any],
    args: Namespace,
) -> Any:
    """Join the group, call ``main(args)``, and leave."""
    if device == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // group.local_size))
    else:
        torch.cuda.set_device(local_rank)
    with exit_on_error():
        _join(local_rank, group, "gloo" if device == "cpu" else "nccl")
    result = main(args)
    dist.destroy_process_group()
    return result


def _join(local_rank: int, group: _Group, backend: str) -> None:
    try:
        dist.init_process_group(
            backend,
            init_method=group.url,
            world_size=group.size,
            rank=group.first + local_rank,
            timeout=DEFAULT_TIMEOUT,
        )
    except dist.DistError as error:
        raise OSError(
            f"The processes cannot meet at {group.url}. Where another run uses that address, give "
            f"a free one by --dist-url, or on one machine --dist-url auto. {error}".splitlines()[0]
        ) from error
    # What detectron2's own launch sets; 0.5 has no public name for it.
    comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(group.local_size)


class SkipEvalOnErrorMixin(TrainerBase):
    """A trainer that does not evaluate after an error: the other processes would not join in.

    For what detectron2's own does where the last iteration fails, and only then.
    """

    def after_train(self) -> None:
        """Let the hooks end."""
        if self.iter < self.max_iter:  # else the last iteration is done
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
        super().after_train()


def wrap_ddp(model: nn.Module, **options: Any) -> nn.Module:
    """Make the model one of all processes; on CPUs, with norms that run there.

    Args:
        model: on its device.
        options: of detectron2's ``create_ddp_model``, used where there are several processes.
    """
    if next(model.parameters()).device.type != "cpu":
        return create_ddp_model(model, **options)
    # On CPUs, no device is a process's own.
    return create_ddp_model(convert_sync_batchnorm_for_cpu(model), device_ids=None, **options)
