"""The attention weights of the pairwise functions, f / C, by their definitions in the paper.

They are the reference of the tests, the source of attention maps, and what is computed where the
weights are no larger than the values. Shape symbols and masks are those of `pairwise`.

Paper: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018, section 3.2.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .casting import accum_dtype, upcast
from .matmul import upcast_matmul


def softmax_weights(theta: Tensor, phi: Tensor, mask: Optional[Tensor], scale: float) -> Tensor:
    """Weights of the (embedded) Gaussian, equations 2 and 3: softmax over j of theta_i . phi_j.

    Args:
        theta: Queries, (B, D, N).
        phi: Keys, (B, D, M).
        mask: Boolean (B, M), True at valid keys, or None for all.
        scale: Factor of the logits; 1 as in the paper.

    Returns:
        Attention weights, (B, N, M); each row sums to one, or to zero without a valid key.
    """
    logits = upcast_matmul(theta.transpose(1, 2), phi) * scale
    if mask is None:
        return logits.softmax(dim=-1)
    # A row of nothing but -inf would be NaN, and so would its gradient: such rows stay unmasked.
    hidden = ~mask & mask.any(dim=1, keepdim=True)
    weights = logits.masked_fill(hidden.unsqueeze(1), -math.inf).softmax(dim=-1)
    return weights.masked_fill(~mask.unsqueeze(1), 0.0)


def dot_product_weights(theta: Tensor, phi: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Weights of the dot product, equation 4: theta_i . phi_j / M, signed; (B, N, M)."""
    weights = upcast_matmul(theta.transpose(1, 2), phi) * one_over_keys(phi[:, 0], mask)
    return weights if mask is None else weights.masked_fill(~mask.unsqueeze(1), 0.0)


def concatenation_weights(a: Tensor, b: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Weights of the concatenation, equation 5: ReLU(a_i + b_j) / M; (B, N, M).

    The vector w_f splits over its two halves, w_f . [theta_i, phi_j] = a_i + b_j, so only the
    two projections are needed: ``a`` (B, N) of the queries and ``b`` (B, M) of the keys.
    """
    a, b = upcast(a), upcast(b)
    weights = F.relu(a.unsqueeze(2) + b.unsqueeze(1)) * one_over_keys(b, mask)
    return weights if mask is None else weights.masked_fill(~mask.unsqueeze(1), 0.0)


def one_over_keys(keys: Tensor, mask: Optional[Tensor]) -> Tensor:
    """(B, 1, 1): 1 / (number of valid keys), 1 if there is none; ``keys`` is (B, M)."""
    present = torch.ones_like(keys) if mask is None else mask
    count = present.sum(dim=1, dtype=accum_dtype(keys)).clamp(min=1)
    return count.reciprocal().view(-1, 1, 1)
