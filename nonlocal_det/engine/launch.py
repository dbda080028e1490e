"""Distributed training: processes by torchrun or detectron2's flags, with NCCL or gloo."""

from __future__ import annotations

import os
import socket
import sys
from argparse import Namespace
from typing import Any, Callable, NamedTuple, TypeVar

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

T = TypeVar("T")


def local_world_size_of(args: Namespace) -> int:
    """Return the number of processes on this machine, by torchrun or detectron2's flags."""
    if dist.is_torchelastic_launched():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return max(args.num_gpus, 1)


def world_size_of(args: Namespace) -> int:
    """Return the number of processes on all machines, by torchrun or detectron2's flags."""
    if dist.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"])
    return local_world_size_of(args) * args.num_machines


def resolve_device(requested: str, cpu_hint: str, args: Namespace) -> str:
    """Choose the device of all processes.

    Args:
        requested: Device of the config, such as "cuda" or "cpu".
        cpu_hint: Override that requests the CPU, for the error message.
        args: detectron2's standard flags.

    Returns:
        The requested device; "cpu" in place of "cuda" if there is no GPU and either torchrun or
        a single process runs.

    Raises:
        ValueError: If there are too few GPUs, or if flags for several machines are missing.
    """
    _check_machine_flags(args)
    local_world_size, gpus = local_world_size_of(args), torch.cuda.device_count()
    by_torchrun = dist.is_torchelastic_launched()
    if requested != "cuda" or gpus >= local_world_size:
        return requested
    if gpus == 0 and (by_torchrun or local_world_size == 1):
        return "cpu"
    flag = "--nproc_per_node" if by_torchrun else "--num-gpus"
    raise ValueError(
        f"{flag} {local_world_size} needs {local_world_size} GPUs on this machine, which has "
        f"{gpus or 'none'}: use {flag} {max(gpus, 1)}, or add {cpu_hint} for {local_world_size} "
        f"processes on CPUs."
    )


def _check_machine_flags(args: Namespace) -> None:
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
    """The process group, as the processes of one machine see it.

    Attributes:
        url: Address at which the processes find each other.
        world_size: Number of processes on all machines.
        local_world_size: Number of processes on this machine.
        first_rank: Rank of this machine's first process.
    """

    url: str
    world_size: int
    local_world_size: int
    first_rank: int


def launch(
    main: Callable[[Namespace], Any],
    args: Namespace,
    device: Callable[[], str],
    check: Callable[[], Any] = lambda: None,
) -> Any:
    """Call ``main(args)`` in every process that torchrun or detectron2's flags request.

    Under torchrun this is one of those processes. Otherwise ``--num-gpus`` processes are spawned,
    and if one of them fails the others are terminated.

    Args:
        main: Function at the top level of a module, since spawned processes import it.
        args: detectron2's standard flags.
        device: Function that returns the device of all processes, "cuda" (one GPU per process of
            this machine) or "cpu". It is not called for a single process.
        check: Function that checks all arguments, called before processes are spawned, so that an
            error is reported once; ``main`` checks them as well.

    Returns:
        The result of ``main``, if it runs in this process.
    """
    world_size, local_world_size = world_size_of(args), local_world_size_of(args)
    by_torchrun = dist.is_torchelastic_launched()
    if world_size == 1 and not by_torchrun:
        return main(args)
    with exit_on_error():
        name = device()
        if not by_torchrun:
            check()
    if by_torchrun:
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        group = _Group("env://", world_size, local_world_size, rank - local_rank)
        return _run_process(local_rank, group, name, main, args)
    first_rank = args.machine_rank * local_world_size
    group = _Group(_url(args), world_size, local_world_size, first_rank)
    try:
        mp.spawn(_run_process, (group, name, main, args), nprocs=local_world_size)
    except mp.ProcessExitedException as error:
        # A process with exit code 1 has printed its error message.
        sys.exit(1 if error.exit_code == 1 else str(error))


def _url(args: Namespace) -> str:
    if args.dist_url != "auto":
        return args.dist_url
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def _run_process(
    local_rank: int,
    group: _Group,
    device: str,
    main: Callable[[Namespace], Any],
    args: Namespace,
) -> Any:
    """Join the process group, call ``main(args)``, and leave the group."""
    if device == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // group.local_world_size))
    else:
        torch.cuda.set_device(local_rank)
    with exit_on_error():
        _join_group(local_rank, group, "gloo" if device == "cpu" else "nccl")
    result = main(args)
    dist.destroy_process_group()
    return result


def _join_group(local_rank: int, group: _Group, backend: str) -> None:
    try:
        dist.init_process_group(
            backend,
            init_method=group.url,
            world_size=group.world_size,
            rank=group.first_rank + local_rank,
            timeout=DEFAULT_TIMEOUT,
        )
    except dist.DistError as error:
        raise OSError(
            f"Process group initialization failed at {group.url}. If another run uses that "
            f"address, pass a free one by --dist-url, or on one machine --dist-url auto. "
            f"{error}".splitlines()[0]
        ) from error
    # What detectron2's own launch sets; 0.5 has no public name for it.
    comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(group.local_world_size)


def on_first_local_process(function: Callable[[], T]) -> T:
    """Call a function in one process of each machine; return its result in all of them.

    Args:
        function: Function whose result can be pickled.

    Raises:
        OSError, ValueError: In all processes, if the function raises it in any.
    """
    outcome: Any = None
    if comm.get_local_rank() == 0:
        try:
            outcome = function()
        except (OSError, ValueError) as error:
            outcome = error
    outcomes = comm.all_gather(outcome)
    for error in outcomes:
        if isinstance(error, Exception):
            raise error
    return outcomes[comm.get_rank() - comm.get_local_rank()]


class SkipEvalOnErrorMixin(TrainerBase):
    """Mixin that skips the final `EvalHook` if the last iteration raised.

    detectron2 would run the final evaluation in that case, which can hang distributed runs because
    the other ranks do not evaluate.
    """

    def after_train(self) -> None:
        """Call the hooks, without evaluation unless the last iteration is done."""
        if self.iter < self.max_iter:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
        super().after_train()


def wrap_ddp(model: nn.Module, **options: Any) -> nn.Module:
    """Wrap a model in DistributedDataParallel if there are several processes.

    On CPUs, SyncBN layers are replaced by ones that run there.

    Args:
        model: Model on its device.
        options: Keyword arguments of DistributedDataParallel.

    Returns:
        The wrapped model, or the model itself for a single process.
    """
    if next(model.parameters()).device.type != "cpu":
        return create_ddp_model(model, **options)
    # On CPUs, no process has a device of its own.
    return create_ddp_model(convert_sync_batchnorm_for_cpu(model), device_ids=None, **options)
