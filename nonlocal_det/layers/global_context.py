"""The global context block: one attention map for all queries, and a bottleneck behind it.

    a = softmax over j of W_k x_j;    z_i = x_i + W_v2 ReLU(LN(W_v1 sum_j a_j x_j))

Paper: Cao, Xu, Lin, Wei, Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and
Beyond", ICCVW 2019 (arXiv 1904.11492), section 3.4 and figure 4 (d).

It is a non-local operation with a single query: the sum over positions is `softmax_attention` with
the constant 1 for theta and W_k x for phi. ``out`` is W_v2 and starts at zero.

Deviations: only the additive fusion, which the paper recommends; a norm after W_v2 can be asked
for. It would see one vector a picture, so a batch norm needs large batches: prefer "" (the paper)
or "GN".

Cost: O(N C) for the map and the sum, 2 C D a picture for the bottleneck; memory O(C + N).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .base import NonLocalBase, init_conv
from .masks import downsample_mask
from .norms import Norm
from .pairwise import softmax_attention, softmax_weights
from .shapes import CONV, unflatten_spatial


class GlobalContextBlock(NonLocalBase):
    """Every position adds the same vector, gathered from all positions; see the module's paper.

    Args:
        channels: C, of input and output.
        dims: number of spatial dimensions, 1, 2 or 3.
        inner_channels: D, the width of the bottleneck; by default a sixteenth of ``channels``, at
            least 1 (the paper's r16; a quarter is its r4).
        norm: after ``out``; see `NonLocalBlock`. The paper has none.

    Raises:
        ValueError: for a value that is not a choice, with the choices.
    """

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        inner_channels: Optional[int] = None,
        norm: Norm = "",
    ) -> None:
        super().__init__(
            channels, dims=dims, inner_channels=inner_channels, norm=norm, reduction=16
        )
        self.w_k = CONV[dims](channels, 1, 1)
        self.w_v1 = CONV[dims](channels, self.inner_channels, 1)
        self.layer_norm = nn.LayerNorm(self.inner_channels)
        init_conv(self.w_k, "he")
        init_conv(self.w_v1, "he")

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The bottleneck's features of the one context vector: (B, D, 1, ...)."""
        keys = downsample_mask(mask)
        logits = self.w_k(x).flatten(2)
        context = shared_attention(logits, x.flatten(2).to(logits.dtype), keys)
        hidden = self.w_v1(context.reshape(list(context.shape) + [1] * (self.dims - 1)))
        y = F.relu(self.layer_norm(hidden.transpose(1, -1))).transpose(1, -1).to(hidden.dtype)
        if keys is not None:
            y = y * keys.any(dim=1).to(y.dtype).reshape([-1] + [1] * (self.dims + 1))
        return y

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """The one map, once for each query."""
        row = shared_weights(self.w_k(x).flatten(2), downsample_mask(mask))
        return unflatten_spatial(row.expand(-1, queries.shape[0], -1), x)


def shared_attention(logits: Tensor, values: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Sum of the values (B, V, M) under one softmax of the logits (B, 1, M): (B, V, 1)."""
    return softmax_attention(torch.ones_like(logits[:, :, :1]), logits, values, mask, 1.0)


def shared_weights(logits: Tensor, mask: Optional[Tensor]) -> Tensor:
    """The weights (B, 1, M) of that sum."""
    return softmax_weights(torch.ones_like(logits[:, :, :1]), logits, mask, 1.0)
