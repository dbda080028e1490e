"""The non-local block, with the paper's four pairwise functions.

Paper: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018 (arXiv 1711.07971),
section 3 and figure 2.

Deviations: none by default, from the paper's text. Where the released code differs from the text,
an argument says so: ``scale``, ``pool_first``, ``init``. Two things the paper leaves open:
subsampling rounds borders up, so no position is dropped; w_f has no bias and starts Gaussian with
std D^-1/2.

Cost, for N queries, M keys (M = N, or N / 4 subsampled by 2) and D inner channels: the four 1x1
convolutions take 2 N C D + 2 M C D multiplications with ``pool_first``, 4 N C D without (3 N C D
for the Gaussian form), and the sums what ``pairwise`` says. No form holds the N x M weights.

Precision: see ``base`` and ``pairwise``.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
import torch.nn as nn
from torch import Tensor

from ..utils.validation import check_choice, check_positive_int
from .base import NonLocalBase, init_conv
from .casting import upcast
from .masks import downsample_mask, masked_max_pool
from .norms import Norm
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


class NonLocalBlock(NonLocalBase):
    """Every position adds a weighted sum over all positions; see the module's paper.

    Args:
        channels: C, of input and output.
        dims: number of spatial dimensions, 1, 2 or 3.
        pairwise: one of ``PAIRWISE``.
        inner_channels: D; by default half of ``channels``, at least 1.
        subsample: True or an integer: max-pool keys and values by 2, or by that much, in space
            (not in time when ``dims`` is 3). Borders are rounded up: no position is dropped.
        pool_first: pool the input before the key and value embeddings, as the released code does,
            not after them, as the text says.
        scale: divide the softmax logits by sqrt(D), as the released code does.
        norm: after the output convolution: "BN", "SyncBN", "GN", "" for none, or a callable from
            a number of channels to a module.
        init: of the embeddings: "he", as the text says, or "gaussian", of standard deviation
            0.01, as the released code does.

    Raises:
        ValueError: for a value that is not a choice, with the choices.
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
        scale: bool = False,
        norm: Norm = "BN",
        init: str = "he",
    ) -> None:
        super().__init__(channels, dims=dims, inner_channels=inner_channels, norm=norm)
        check_choice("pairwise", pairwise, PAIRWISE)
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

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The sums y of equation 1, (B, D, *S); see `NonLocalBase.aggregate`."""
        theta = self._queries(x).flatten(2)
        phi, g, keys = self._keys_and_values(x, mask)
        y = self._attend(theta, phi.flatten(2), g.flatten(2), keys)
        return unflatten_spatial(y, x)

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """The weights f / C of equation 1; see `NonLocalBase.attention`."""
        theta = self._queries(x).flatten(2)[:, :, queries]
        phi, _, keys = self._keys_and_values(x, mask)
        return unflatten_spatial(self._weights(theta, phi.flatten(2), keys), phi)

    def _queries(self, x: Tensor) -> Tensor:
        """What is compared of the queries: theta (B, D, *S), or x itself for the Gaussian form."""
        theta = self.theta(x) if hasattr(self, "theta") else x
        if hasattr(self, "w_f"):
            theta = _weighted(theta, self.w_f[: self.inner_channels])
        return theta

    def _keys_and_values(
        self, x: Tensor, mask: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """What is compared of the keys (B, D, *K), g (B, D, *K) and their mask (B, M)."""
        source = masked_max_pool(x, self.stride, mask) if self.pool_first else x
        phi = self.phi(source) if hasattr(self, "phi") else source
        g = self.g(source)
        if not self.pool_first:
            phi, g = masked_max_pool(phi, self.stride, mask), masked_max_pool(g, self.stride, mask)
        if hasattr(self, "w_f"):
            phi = _weighted(phi, self.w_f[self.inner_channels :])
        return phi, g, downsample_mask(mask, self.stride)

    def _attend(self, theta: Tensor, phi: Tensor, g: Tensor, mask: Optional[Tensor]) -> Tensor:
        """The sums y (B, D, N) of g (B, D, M) for theta (B, D, N) and phi (B, D, M)."""
        if self.pairwise == "dot_product":
            return dot_product_attention(theta, phi, g, mask)
        if self.pairwise == "concatenation":
            return concatenation_attention(_total(theta), _total(phi), g, mask)
        return softmax_attention(theta, phi, g, mask, self.scale)

    def _weights(self, theta: Tensor, phi: Tensor, mask: Optional[Tensor]) -> Tensor:
        """The weights (B, N, M) of those sums."""
        if self.pairwise == "dot_product":
            return dot_product_weights(theta, phi, mask)
        if self.pairwise == "concatenation":
            return concatenation_weights(_total(theta), _total(phi), mask)
        return softmax_weights(theta, phi, mask, self.scale)


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    """The terms of w_f . x before they are added: channels of (B, D, *S) times their weights."""
    return (x.transpose(1, -1) * weight.to(x.dtype)).transpose(1, -1)


def _total(x: Tensor) -> Tensor:
    """(B, D, N) to (B, N): what the concatenation compares, one number a position."""
    return upcast(x).sum(dim=1)
