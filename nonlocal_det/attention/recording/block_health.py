"""Health of a block in a call: what it adds to its input, and how concentrated its attention is.

It is measured by forward hooks, on the call itself: no block runs again or in another mode, nothing
gets a gradient, and no random number of the caller is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ...errors import errors_logged
from ...layers import GlobalContextBlock, NonLocalBase
from .statistics import relative_entropy, residual_ratio

_NUM_QUERIES = 64
_SOFTMAX_FUNCTIONS = ("gaussian", "embedded_gaussian")


@dataclass(frozen=True)
class BlockHealth:
    """What one call of a block tells; NaN where it is undefined.

    Attributes:
        residual_ratio: Norm of what the block adds over the norm of its input.
        entropy: Mean entropy of the attention, relative to a uniform one over the keys that a query
            can attend to (of a windowed block, those in its window); NaN without a softmax.
        max_weight: Mean of the largest attention weight of a query; NaN without a softmax.
        is_identity: Whether the output equals the input exactly.
    """

    residual_ratio: float
    entropy: float
    max_weight: float
    is_identity: bool


@torch.no_grad()
def block_health(
    block: NonLocalBase, x: Tensor, z: Tensor, mask: Optional[Tensor]
) -> Optional[BlockHealth]:
    """Measure a call of a block at up to 64 positions of its first image or, in a head, first RoI.

    Args:
        block: The block, which is not run again.
        x: Its input, (B, C, *S).
        z: Its output, of the same shape.
        mask: Boolean (B, *S), True at valid positions, or None for all.

    Returns:
        Its health; None if there is no image or no valid position.
    """
    valid = torch.ones_like(x[:1, 0], dtype=torch.bool) if mask is None else mask[:1]
    positions = valid.flatten().nonzero()[:, 0]
    if not len(positions):
        return None
    # A generator of its own: the random numbers of the training must not shift.
    count = min(_NUM_QUERIES, len(positions))
    chosen = np.random.default_rng(0).choice(len(positions), count, replace=False)
    queries = positions[torch.as_tensor(chosen, device=x.device)]
    entropy = max_weight = math.nan
    if isinstance(block, GlobalContextBlock) or _pairwise(block) in _SOFTMAX_FUNCTIONS:
        weights = block.attention_weights(x[:1], queries, valid)[0].flatten(1).float()
        # Without features all logits are equal: the weights are zero only where no key can be.
        uniform = block.attention_weights(torch.zeros_like(x[:1]), queries, valid)[0].flatten(1)
        num_keys = (uniform > 0).sum(dim=1)
        entropy = relative_entropy(weights.cpu().numpy(), num_keys.cpu().numpy())
        max_weight = weights.amax(dim=1).mean().item()
    inputs, outputs = (t[0].flatten(1)[:, queries].float().cpu().numpy() for t in (x, z))
    ratio = residual_ratio(inputs, outputs - inputs)
    return BlockHealth(ratio, entropy, max_weight, is_identity=torch.equal(x, z))


def _pairwise(block: NonLocalBase) -> Optional[str]:
    return getattr(block, "pairwise", None)


class HealthMeter:
    """Measures the first call of each block of a model, from `attach` to `detach`.

    An error here is logged and does not end the call.

    Attributes:
        found: Health by block name, of the blocks that ran on anything, in the order of their
            calls.
    """

    def __init__(self) -> None:
        self.found: dict[str, BlockHealth] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Start to measure."""
        self.found = {}
        for name, module in model.named_modules():
            if isinstance(module, NonLocalBase):
                hook = partial(self._after_block, name)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> bool:
        """Remove all hooks; return whether there were any."""
        attached = bool(self._handles)
        while self._handles:
            self._handles.pop().remove()
        return attached

    def _after_block(
        self, name: str, block: NonLocalBase, args: tuple[Any, ...], kwargs: Any, z: Tensor
    ) -> None:
        if name not in self.found:
            # At once: now the padding mask of the call holds, and the weights are those behind z.
            with errors_logged(f"The health of {name} cannot be measured"):
                x, mask = _arguments(*args, **kwargs)
                health = block_health(block, x, z, block.resolve_mask(x, mask))
                if health is not None:
                    self.found[name] = health


def _arguments(x: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Optional[Tensor]]:
    """The arguments of a block's forward, however they were passed."""
    return x, mask
