"""Masks that reach the blocks of a network whose modules pass on features alone.

The pixel mask of a call belongs to the thread that makes the call, for as long as it runs.
Activation checkpointing runs parts of the call again in the backward pass, where the call is over
and the thread may be another one. A part starts with features that it was called with before:
their storage carries the mask from one run to the other.

Why not otherwise: an attribute of the blocks is overwritten by a call in another thread, and gone
in the backward pass; an argument would need a forward of its own in every network; a subclass of
Tensor is lost in custom autograd functions, and costs time in every operator.
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from .capture import is_tracing_or_compiling

# An empty tensor, not None: the type of a TorchScript attribute cannot change.
NO_PIXEL_MASK = torch.zeros(0, dtype=torch.bool)

_MARK = "_nonlocal_det_call"  # attribute of a storage


class _Call:
    """One call of a network: its pixel mask, and whether it may be followed by a backward pass."""

    def __init__(self, mask: Tensor, recomputable: bool) -> None:
        self.mask = mask
        self.recomputable = recomputable


class _Thread(threading.local):
    """What is running in this thread: a call, or in a backward pass a part of one again."""

    call: Optional[_Call] = None
    recomputed: Optional[_Call] = None
    backward: int = -1  # the backward pass of ``recomputed``


_thread = _Thread()


def call_with_pixel_mask(mask: Tensor, function: Callable[[], Any]) -> Any:
    """Call a function; the blocks that run in it get the mask, in this thread alone.

    Args:
        mask: Boolean (B, H, W), True on real pixels, or `NO_PIXEL_MASK` for all.
        function: What is called, without arguments.

    Returns:
        What the function returns.
    """
    outer = _thread.call
    _thread.call = _Call(mask, torch.is_grad_enabled())
    try:
        return function()
    finally:
        _thread.call = outer


def current_pixel_mask(features: Tensor) -> Optional[Tensor]:
    """The mask of the call that is running or run again, or None outside of one.

    Args:
        features: Input of a module in the call. In a call, its storage is marked; in a backward
            pass, a marked storage says which call is run again.
    """
    call = _thread.call
    if is_tracing_or_compiling():
        return None if call is None else call.mask
    storage = storage_of(features)
    if call is None:
        call = _recomputed_call(storage)
    if call is None:
        return None
    if call.recomputable and storage is not None:
        setattr(storage, _MARK, call)
    return call.mask


def storage_of(x: Tensor) -> Optional[torch.UntypedStorage]:
    """The storage of a tensor; None for the wrappers of `torch.func`, which have none."""
    try:
        return x.untyped_storage()
    except NotImplementedError:
        return None


def in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return not is_tracing_or_compiling() and torch._C._current_graph_task_id() >= 0


def _recomputed_call(storage: Optional[torch.UntypedStorage]) -> Optional[_Call]:
    backward = torch._C._current_graph_task_id()
    if backward < 0:
        return None
    marked: Optional[_Call] = getattr(storage, _MARK, None)
    if marked is not None:
        _thread.recomputed, _thread.backward = marked, backward
    return _thread.recomputed if _thread.backward == backward else None
