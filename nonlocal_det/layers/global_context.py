"""The global context block: one attention map shared by all queries, then a bottleneck.

    a = softmax over j of W_k x_j;    z_i = x_i + W_v2 ReLU(LN(W_v1 sum_j a_j x_j))

Paper: Cao, Xu, Lin, Wei, Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and
Beyond", ICCVW 2019 (arXiv 1904.11492), section 3.4 and figure 4 (d).

It is a non-local operation with a single query: the sum over positions is `softmax_attention` with
the constant 1 for theta and W_k x for phi. ``out`` is W_v2 and starts at zero.

Deviations from the paper: additive fusion only, which the paper recommends; an optional norm after
W_v2. The norm sees one vector per image, so batch norm needs large batches: prefer "" (as in the
paper, and the default) or "GN".

Cost: O(N C) for the map and the sum, 2 C D per image for the bottleneck; memory O(C + N).
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
    """Global context block of GCNet: every position adds the same vector, pooled from all.

    Args:
        channels: Number of input and output channels, C.
        dims: Number of spatial dimensions, 1, 2 or 3.
        inner_channels: Width of the bottleneck, D; a sixteenth of ``channels`` by default, at least
            1 (ratio r16 of the paper; a quarter is its r4).
        norm: Norm after the output convolution; see `NonLocalBlock`. The paper has none.

    Raises:
        ValueError: If an argument is not one of its choices, which the message lists.
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
        init_conv(self.w_k, "kaiming")
        init_conv(self.w_v1, "kaiming")

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The bottleneck's features of the context vector, (B, D, 1, ...)."""
        keys = downsample_mask(mask)
        logits = self.w_k(x).flatten(2)
        context = shared_attention(logits, x.flatten(2).to(logits.dtype), keys)
        hidden = self.w_v1(context.reshape(list(context.shape) + [1] * (self.dims - 1)))
        y = F.relu(self.layer_norm(hidden.transpose(1, -1))).transpose(1, -1).to(hidden.dtype)
        if keys is not None:
            y = y * keys.any(dim=1).to(y.dtype).reshape([-1] + [1] * (self.dims + 1))
        return y

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """The shared map, repeated for each query."""
        row = shared_weights(self.w_k(x).flatten(2), downsample_mask(mask))
        return unflatten_spatial(row.expand(-1, queries.shape[0], -1), x)


def shared_attention(logits: Tensor, values: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Sum of values (B, V, M) weighted by the softmax of logits (B, 1, M): (B, V, 1)."""
    return softmax_attention(torch.ones_like(logits[:, :, :1]), logits, values, mask, 1.0)


def shared_weights(logits: Tensor, mask: Optional[Tensor]) -> Tensor:
    """The weights (B, 1, M) of `shared_attention`."""
    return softmax_weights(torch.ones_like(logits[:, :, :1]), logits, mask, 1.0)
