"""What `torch.func` and second derivatives need of an autograd function written by hand."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor


def fold_into_batch(size: int, in_dims: tuple[Optional[int], ...], args: tuple[Any, ...]) -> list:
    """Arguments of `torch.func.vmap` with the mapped dimension as a part of the batch.

    Args:
        size: Size of the mapped dimension.
        in_dims: Place of that dimension in each argument, or None where there is none.
        args: Tensors whose first dimension is the batch, but for the mapped one, or None.
    """
    folded = []
    for x, dim in zip(args, in_dims):
        if x is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            x = x.flatten(0, 1)
        folded.append(x)
    return folded


def split_from_batch(size: int, y: Tensor) -> Tensor:
    """Undo `fold_into_batch` for a result; the mapped dimension comes first."""
    return y.unflatten(0, (size, y.shape[0] // size))


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a function of ordinary operators that can be differentiated again."""
    return torch.func.vjp(function, *inputs)[1](grad)
