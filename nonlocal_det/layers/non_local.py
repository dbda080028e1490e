"""The non-local block, with the paper's four pairwise functions.

Paper: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018 (arXiv 1711.07971),
section 3 and figure 2.

Deviation from the paper: by default a softmax compares queries and keys by their cosine, times a
learned factor, as in Henry et al., "Query-Key Normalization for Transformers", Findings of EMNLP
2020 (arXiv 2010.04245). So the attention starts neither peaked nor flat, whatever the features,
where the paper's products start with an arg max and the official Caffe2 code's almost uniform.
``scale=False`` is the paper's block; ``scale=True``, ``pool_first`` and ``init`` select what the
official code does.

Two details the paper leaves open: subsampling rounds up, so no position is dropped; w_f has no bias
and is initialized from a normal distribution of standard deviation D^-1/2.

Cost, for N queries, M keys (M = N, or N / 4 subsampled by 2) and D inner channels: the four 1x1
convolutions take 2 N C D + 2 M C D multiplications with ``pool_first``, 4 N C D without (3 N C D
with the Gaussian function); `nonlocal_det.layers.pairwise` lists the cost of the attention output.
The N x M attention weights are never materialized.

Precision: see `nonlocal_det.layers.base` and `nonlocal_det.layers.pairwise`.
"""

from __future__ import annotations

import math
from typing import Optional, Union

import torch
import torch.nn as nn
from torch import Tensor

from ..utils.validation import check_choice, check_positive_int
from .base import NonLocalBase, init_conv
from .casting import upcast
from .masks import downsample_mask, masked_max_pool
from .norms import Norm, unit_length
from .pairwise import (
    concatenation_attention,
    concatenation_weights,
    dot_product_attention,
    dot_product_weights,
    softmax_attention,
    softmax_weights,
)
from .shapes import CONV, unflatten_spatial

PAIRWISE = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
SOFTMAX = ("gaussian", "embedded_gaussian")
_LOGIT_SCALE = 10.0
MAX_LOGIT_SCALE = 100.0  # as in CLIP and Swin V2, so that the softmax stays below an arg max


class NonLocalBlock(NonLocalBase):
    """Non-local block of Wang et al., CVPR 2018: each position adds a weighted sum over all.

    Args:
        channels: Number of input and output channels, C.
        dims: Number of spatial dimensions, 1, 2 or 3.
        pairwise: Pairwise function, one of ``PAIRWISE``.
        inner_channels: Number of inner channels, D; half of ``channels`` by default, at least 1.
        subsample: Factor by which keys and values are max-pooled in space (not in time when
            ``dims`` is 3); True is 2, False none. Sizes are rounded up: no position is dropped.
        pool_first: Whether to pool before the key and value embeddings, as in the official Caffe2
            code, instead of after them, as in the paper.
        scale: Whether to divide the softmax logits by sqrt(D), as in the official Caffe2 code, or
            not, as in the paper. By default neither: see ``qk_norm``.
        qk_norm: Whether to scale queries and keys to unit length. The softmax logits are then their
            cosines, times a learned factor. By default, with a softmax unless ``scale`` is given.
        logit_scale: Initial value of that factor, from 1 to 100; 10 by default, as in Swin V2.
        norm: Norm after the output convolution: "BN", "SyncBN", "GN", "" for none, or a callable
            from a number of channels to a module.
        init: Initialization of the embeddings: "kaiming", as in the paper, or "normal", of standard
            deviation 0.01, as in the official Caffe2 code.

    Raises:
        ValueError: If an argument is not one of its choices, which the message lists.
    """

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        pairwise: str = "embedded_gaussian",
        inner_channels: Optional[int] = None,
        subsample: Union[bool, int] = False,
        pool_first: bool = False,
        scale: Optional[bool] = None,
        qk_norm: Optional[bool] = None,
        logit_scale: Optional[float] = None,
        norm: Norm = "BN",
        init: str = "kaiming",
    ) -> None:
        super().__init__(channels, dims=dims, inner_channels=inner_channels, norm=norm)
        check_choice("pairwise", pairwise, PAIRWISE)
        _check_logits(pairwise, scale, qk_norm, logit_scale)
        stride = {True: 2, False: 1}[subsample] if isinstance(subsample, bool) else subsample
        check_positive_int("subsample", stride)
        self.pairwise = pairwise
        self.stride = stride
        self.pool_first = pool_first
        self.scale = self.inner_channels**-0.5 if scale else 1.0

        embedded = ("g",) if pairwise == "gaussian" else ("theta", "phi", "g")
        for name in embedded:
            self.add_module(name, CONV[dims](channels, self.inner_channels, 1))
            init_conv(self.get_submodule(name), init)
        if pairwise == "concatenation":
            self.w_f = nn.Parameter(torch.empty(2 * self.inner_channels))
            nn.init.normal_(self.w_f, std=self.inner_channels**-0.5)
        self.max_log_scale = math.log(MAX_LOGIT_SCALE)
        self.qk_norm = pairwise in SOFTMAX and scale is None if qk_norm is None else qk_norm
        if self.qk_norm and pairwise in SOFTMAX:
            initial = _LOGIT_SCALE if logit_scale is None else logit_scale
            # Its logarithm, so that a step changes it by a factor.
            self.logit_scale = nn.Parameter(torch.tensor(math.log(initial)))

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The attention output y of equation 1, (B, D, *S); see `NonLocalBase.aggregate`."""
        theta = self._queries(x).flatten(2)
        phi, g, keys = self._keys_and_values(x, mask)
        y = self._attend(theta, phi.flatten(2), g.flatten(2), keys)
        return unflatten_spatial(y, x)

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """The weights f / C of equation 1; see `NonLocalBase.attention_weights`."""
        theta = self._queries(x).flatten(2)[:, :, queries]
        phi, _, keys = self._keys_and_values(x, mask)
        return unflatten_spatial(self._weights(theta, phi.flatten(2), keys), phi)

    def _queries(self, x: Tensor) -> Tensor:
        """Query embedding theta, (B, D, *S); x itself with the Gaussian function."""
        theta = self.theta(x) if hasattr(self, "theta") else x
        if hasattr(self, "w_f"):
            theta = _weighted(theta, self.w_f[: self.inner_channels])
        return theta

    def _keys_and_values(
        self, x: Tensor, mask: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """Key embedding (B, D, *K), value embedding (B, D, *K) and key mask (B, M) or None."""
        source = masked_max_pool(x, self.stride, mask) if self.pool_first else x
        phi = self.phi(source) if hasattr(self, "phi") else source
        g = self.g(source)
        if not self.pool_first:
            phi, g = masked_max_pool(phi, self.stride, mask), masked_max_pool(g, self.stride, mask)
        if hasattr(self, "w_f"):
            phi = _weighted(phi, self.w_f[self.inner_channels :])
        return phi, g, downsample_mask(mask, self.stride)

    def _attend(self, theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Attention output (B, D, N) from theta (B, D, N), phi (B, D, M) and g (B, D, M)."""
        theta, phi = self._compared(theta, phi)
        if self.pairwise == "dot_product":
            return dot_product_attention(theta, phi, g, mask)
        if self.pairwise == "concatenation":
            return concatenation_attention(_total(theta), _total(phi), g, mask)
        return softmax_attention(theta, phi, g, mask, self.scale)

    def _compared(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as the pairwise function compares them."""
        if self.qk_norm:
            theta, phi = unit_length(theta), unit_length(phi)
        if hasattr(self, "logit_scale"):
            theta = theta * self.logit_scale.clamp(max=self.max_log_scale).exp().to(theta.dtype)
        return theta, phi

    def _weights(self, theta: Tensor, phi: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Attention weights (B, N, M) behind `_attend`."""
        theta, phi = self._compared(theta, phi)
        if self.pairwise == "dot_product":
            return dot_product_weights(theta, phi, mask)
        if self.pairwise == "concatenation":
            return concatenation_weights(_total(theta), _total(phi), mask)
        return softmax_weights(theta, phi, mask, self.scale)


def _check_logits(
    pairwise: str, scale: Optional[bool], qk_norm: Optional[bool], logit_scale: Optional[float]
) -> None:
    """Raise a ValueError for settings of the logits that this pairwise function has not."""
    for name, value in (("scale", scale), ("qk_norm", qk_norm)):
        check_choice(name, value, (None, False, True))
    given = "scale" if scale else "logit_scale" if logit_scale is not None else ""
    if pairwise not in SOFTMAX and given:
        raise ValueError(
            f"{given} is for the softmax of {' or '.join(SOFTMAX)}, which {pairwise} has not."
        )
    if pairwise == "concatenation" and qk_norm:
        raise ValueError(
            "qk_norm is for products of queries and keys, which concatenation has not."
        )
    if qk_norm and scale:
        raise ValueError("scale and qk_norm exclude each other: cosines need no division.")
    if logit_scale is not None:
        if not qk_norm and (qk_norm is False or scale is not None):
            raise ValueError("logit_scale is for cosines: set qk_norm, or leave out scale.")
        if not isinstance(logit_scale, (int, float)) or not 1 <= logit_scale <= MAX_LOGIT_SCALE:
            limit = f"a number from 1 to {MAX_LOGIT_SCALE:g}"
            raise ValueError(f"logit_scale is {logit_scale!r}; it must be {limit}.")


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    """Summands of w_f . x: the channels of (B, D, *S), each times its weight."""
    return (x.transpose(1, -1) * weight.to(x.dtype)).transpose(1, -1)


def _total(x: Tensor) -> Tensor:
    """(B, D, N) to (B, N): sum over channels, the one number per position that is compared."""
    return upcast(x).sum(dim=1)
