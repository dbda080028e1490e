"""The disentangled non-local block: a whitened pairwise term plus a unary term.

    y_i = sum_j [softmax_j((theta_i - mean theta) . (phi_j - mean phi)) + softmax_j(m_j)] g_j

Paper: Yin, Yao, Cao, Li, Zhang, Lin, Hu, "Disentangled Non-Local Neural Networks", ECCV 2020
(arXiv 2006.06668), section 4. m_j = W_m x_j is one number per position, shared by all queries.

Deviations from the official code: no temperature (it divides the logits by 0.05 for segmentation,
by 1 for detection); both terms start at full weight and the block's own zero-initialized factor
makes it the identity, where the code for detection zeroes a factor of the pairwise term only.
``scale`` divides the pairwise logits by sqrt(D), as that code does. Means are taken over valid
positions; those of the keys over the subsampled keys.

Cost: that of the embedded Gaussian block plus O(N (C + D)).
"""

from __future__ import annotations

from typing import Optional, Union

from torch import Tensor

from .base import init_conv
from .casting import saturating_cast, upcast
from .global_context import shared_attention, shared_weights
from .masks import downsample_mask, masked_max_pool
from .non_local import NonLocalBlock
from .norms import Norm
from .shapes import CONV, unflatten_spatial


class DisentangledNonLocalBlock(NonLocalBlock):
    """Disentangled non-local block (DNL): whitened pairwise term plus a unary saliency term.

    The arguments are those of `NonLocalBlock`, except for the pairwise function, which is always
    the embedded Gaussian.

    Raises:
        ValueError: If an argument is not one of its choices, which the message lists.
    """

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        inner_channels: Optional[int] = None,
        subsample: Union[bool, int] = False,
        pool_first: bool = False,
        scale: Optional[bool] = None,
        qk_norm: Optional[bool] = None,
        logit_scale: Optional[float] = None,
        norm: Norm = "BN",
        init: str = "kaiming",
    ) -> None:
        super().__init__(
            channels,
            dims=dims,
            inner_channels=inner_channels,
            subsample=subsample,
            pool_first=pool_first,
            scale=scale,
            qk_norm=qk_norm,
            logit_scale=logit_scale,
            norm=norm,
            init=init,
        )
        self.w_m = CONV[dims](channels, 1, 1)
        init_conv(self.w_m, init)

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Attention output of both terms, (B, D, *S)."""
        theta = _whiten(self._queries(x).flatten(2), downsample_mask(mask))
        phi, g, keys = self._keys_and_values(x, mask)
        phi, g = _whiten(phi.flatten(2), keys), g.flatten(2)
        unary = shared_attention(self._unary(x, mask), g, keys)
        return unflatten_spatial(self._attend(theta, phi, g, keys) + unary, x)

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Sum of both softmaxes: each row adds up to two."""
        theta = _whiten(self._queries(x).flatten(2), downsample_mask(mask))[:, :, queries]
        phi, _, keys = self._keys_and_values(x, mask)
        pairwise = self._weights(theta, _whiten(phi.flatten(2), keys), keys)
        unary = shared_weights(self._unary(x, mask), keys)
        return unflatten_spatial(pairwise + unary, phi)

    def _unary(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Unary logits m (B, 1, M), subsampled like the keys."""
        if self.pool_first:
            m = self.w_m(masked_max_pool(x, self.stride, mask))
        else:
            m = masked_max_pool(self.w_m(x), self.stride, mask)
        return m.flatten(2)


def _whiten(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Subtract from (B, D, N) its mean over valid positions.

    For the keys this does not change the softmax; it only keeps the logits small.
    """
    full = upcast(x)
    if mask is None:
        mean = full.mean(dim=2, keepdim=True)
    else:
        valid = mask.unsqueeze(1).to(full.dtype)
        mean = (full * valid).sum(dim=2, keepdim=True) / valid.sum(dim=2, keepdim=True).clamp(min=1)
    return saturating_cast(full - mean, x.dtype)
