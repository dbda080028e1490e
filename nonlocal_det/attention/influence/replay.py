"""Runs a part of a model again from a block on; what does not depend on the block runs once.

The first run keeps the outputs of all modules beside the path from the model to the block. Later
runs take those whose inputs are the same objects, which are those that the block has no effect on.
On request, they also take those that have no effect on the result, such as an FPN level from which
nothing is pooled. The model is changed during a run only, in this thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Optional, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from ...layers.base import NonLocalBase

T = TypeVar("T")
# What replaces the forward of a block: its input and mask to its output.
BlockForward = Callable[[Tensor, Optional[Tensor]], Tensor]


class Replay(Generic[T]):
    """A computation with a model, to be repeated with other outputs of one of its blocks.

    Args:
        model: The model.
        block: The block, a module of it.
        compute: The computation, which calls the model or modules of it, with the same arguments,
            the same objects, each time.
        tensors: From a result to its tensors.

    Attributes:
        result: What the computation returns with the block as it is.
        x: Input of the block.
        mask: Mask of the valid positions that the block got or inferred, or None.

    Raises:
        RuntimeError: If the computation does not call the block exactly once.
    """

    def __init__(
        self,
        model: nn.Module,
        block: NonLocalBase,
        compute: Callable[[], T],
        tensors: Callable[[T], Iterable[Tensor]],
    ) -> None:
        self._block = block
        self._compute = compute
        self._tensors = tensors
        self._recomputed: set[nn.Module] = set()
        self._unused: set[nn.Module] = set()
        self._are_unused_known = False
        self._known: dict[nn.Module, list[tuple[Sequence[Any], Any]]] = {
            module: [] for module in _beside_path(model, block)
        }
        calls: list[tuple[Tensor, Optional[Tensor]]] = []
        original = block.forward

        def record(x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
            calls.append((x, block.resolve_mask(x, mask)))
            return original(x, mask)

        self.result = self._run(record)
        if len(calls) != 1:
            raise RuntimeError(f"The block ran {len(calls)} times in the computation, not once.")
        ((self.x, self.mask),) = calls

    def run(self, forward: BlockForward) -> T:
        """Repeat the computation with another forward of the block."""
        return self._run(forward)

    def skip_unused(self) -> None:
        """Find modules after the block without effect on the result, and run them no more.

        They are those whose output can be nan without a nan in the result. This takes a run for
        each module, once, so it pays for many runs.
        """
        if self._are_unused_known:
            return
        self._are_unused_known = True

        def unchanged(x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
            return x

        self._recomputed.clear()
        self._run(unchanged)
        for module in tuple(self._recomputed):
            output = self._known[module][0][1]
            if isinstance(output, Tensor) and len(self._known[module]) == 1:
                nan = torch.full_like(output, torch.nan)
                result = self._run(unchanged, {module: lambda *_, nan=nan, **__: nan})
                if not any(bool(tensor.isnan().any()) for tensor in self._tensors(result)):
                    self._unused.add(module)

    def _run(self, forward: BlockForward, others: Mapping[nn.Module, Callable[..., Any]] = {}) -> T:
        replaced = {module: self._remembering(module) for module in self._known}
        with torch.no_grad(), _forwards({**replaced, **others, self._block: forward}):
            return self._compute()

    def _remembering(self, module: nn.Module) -> Callable[..., Any]:
        original, known = module.forward, self._known[module]

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            for inputs, output in known:
                if module in self._unused or _are_same(inputs, given):
                    return output
            self._recomputed.add(module)
            output = original(*args, **kwargs)
            if not hasattr(self, "result"):  # in the first run
                known.append((given, output))
            return output

        return forward


def _beside_path(model: nn.Module, block: nn.Module) -> Iterator[nn.Module]:
    """The children of the modules that contain the block, without those on the path to it."""
    for module in model.modules():
        inside = set(module.modules())
        if module is not block and block in inside:
            yield from (c for c in module.children() if block not in set(c.modules()))


def _are_same(a: Any, b: Any) -> bool:
    """Whether arguments are the same objects; lists, tuples and dicts of the same objects are."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_are_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_are_same(a[key], b[key]) for key in a)
    return a is b


@contextmanager
def _forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules; calls in other threads run the modules' own.

    Raises:
        RuntimeError: If the forward of a module is replaced already.
    """
    for module in forwards:
        if "forward" in vars(module):
            raise RuntimeError(
                f"The forward of a {type(module).__name__} is replaced already; influence cannot "
                f"be computed inside of another computation of it."
            )
    thread = threading.get_ident()
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = _of_thread(thread, forward, module.forward)
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def _of_thread(
    thread: int, forward: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (forward if threading.get_ident() == thread else original)(*args, **kwargs)

    return chosen
