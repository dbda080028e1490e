"""The compact generalized non-local block: pairs of channels as well as pairs of positions.

Inside each of G channel groups, a runs over the (channel, position) pairs of the queries and b over
those of the keys; theta, phi and g are one number per pair:

    y_a = sum_b f(theta_a, phi_b) g_b

    dot_product   f = theta phi
    gaussian      f = exp(-2 gamma) sum_{p <= P} (2 gamma theta phi)^p / p!

P is the Taylor order. Each f is a sum of products of a factor of a and a factor of b, so the sum
over b is computed once for all a: no pair is ever formed.

Paper: Yue, Sun, Yuan, Zhou, Ding, Xu, "Compact Generalized Non-local Network", NeurIPS 2018 (arXiv
1810.13125), section 3. "gaussian" is the Taylor expansion of the RBF kernel exp(-gamma (theta -
phi)^2) for theta and phi of length one, so that the squares leave exp(-2 gamma). As in the
official code, theta and phi are not in fact normalized, gamma is 1e-4, the embeddings have no
bias, and ``out`` is a grouped convolution.

Deviations: the norm is an argument, where the official code has a group norm of G groups
(``norm=lambda c: nn.GroupNorm(groups, c)``). That one divides by the size of the group's sum and
keeps little but its sign; "BN", the default here, keeps the differences between images. The sums
grow with the number of positions: ``scale`` divides by sqrt(pairs), an option of the official code.

Cost: four convolutions, and O(N D) for the sums, times P for the Gaussian kernel.

Precision: the sums, and y until it is complete, are float32.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from ..utils.deprecation import renamed_arguments
from ..utils.validation import check_choice, check_positive_int
from .base import NonLocalBase, init_conv
from .casting import saturating_cast, upcast
from .masks import float_mask
from .norms import Norm
from .shapes import CONV, split_channel_groups, unflatten_spatial

KERNELS = ("dot_product", "gaussian")


class CompactGeneralizedNonLocalBlock(NonLocalBase):
    """Compact generalized non-local block (CGNL): attention over positions and channels.

    Args:
        channels: Number of input and output channels, C.
        dims: Number of spatial dimensions, 1, 2 or 3.
        kernel: Kernel function, one of ``KERNELS``.
        taylor_order: Order P of the Gaussian kernel's Taylor expansion, at least 1.
        gamma: Parameter of the Gaussian kernel, above 0.
        inner_channels: Number of inner channels, D; half of ``channels`` by default, at least 1.
        groups: Number of channel groups, G, a divisor of C and D; 8 in the paper's experiments.
        scale: Whether to divide the sums by sqrt(number of pairs).
        norm: Norm after the output convolution; see `NonLocalBlock`.

    Raises:
        ValueError: If an argument is not one of its choices, which the message lists.
    """

    @renamed_arguments(order="taylor_order")
    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        kernel: str = "dot_product",
        taylor_order: int = 3,
        gamma: float = 1e-4,
        inner_channels: Optional[int] = None,
        groups: int = 1,
        scale: bool = False,
        norm: Norm = "BN",
    ) -> None:
        super().__init__(
            channels, dims=dims, inner_channels=inner_channels, norm=norm, out_groups=groups
        )
        check_choice("kernel", kernel, KERNELS)
        check_positive_int("taylor_order", taylor_order)
        if not gamma > 0:
            raise ValueError(f"gamma is {gamma!r}; it must be above 0.")
        self.groups = groups
        self.scale = scale
        # f = sum over p of coefficients[p] * (theta * phi)^p, from p = 0.
        self.coefficients = [0.0, 1.0]
        if kernel == "gaussian":
            beta = math.exp(-2 * gamma)
            self.coefficients = [
                beta * (2 * gamma) ** p / math.factorial(p) for p in range(taylor_order + 1)
            ]
        self.theta = CONV[dims](channels, self.inner_channels, 1, bias=False)
        self.phi = CONV[dims](channels, self.inner_channels, 1, bias=False)
        self.g = CONV[dims](channels, self.inner_channels, 1, bias=False)
        for embedding in (self.theta, self.phi, self.g):
            init_conv(embedding, "kaiming")

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Attention output y, (B, D, *S)."""
        embedded = self.theta(x)
        theta, phi = self._in_groups(embedded), self._in_groups(self.phi(x))
        g = self._in_groups(self.g(x)) * self._key_factors(x, mask)
        sums = [
            coefficient * (phi**p * g).sum(dim=[2, 3], keepdim=True)
            for p, coefficient in enumerate(self.coefficients)
        ]
        y = sums[-1]
        for p in range(len(sums) - 2, -1, -1):  # Horner: a polynomial in theta
            y = y * theta + sums[p]
        return saturating_cast(unflatten_spatial(y.flatten(1, 2), x), embedded.dtype)

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Mean of f, scaled, over the groups and their channel pairs."""
        theta, phi = self._in_groups(self.theta(x))[..., queries], self._in_groups(self.phi(x))
        factors = self._key_factors(x, mask)
        weights = torch.zeros_like(phi[:, 0, :1])
        for p, coefficient in enumerate(self.coefficients):
            query, key = (theta**p).mean(dim=2), (phi**p * factors).mean(dim=2)
            weights = weights + coefficient * torch.einsum("bgq,bgn->bqn", query, key)
        return unflatten_spatial(weights / self.groups, x)

    def _in_groups(self, x: Tensor) -> Tensor:
        """(B, D, *S) to float32 (B, G, D / G, N)."""
        return split_channel_groups(upcast(x), self.groups)

    def _key_factors(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        """(B, 1, 1, N): factor of each key's values, 0 for a masked key."""
        valid = upcast(float_mask(x, mask)).flatten(2).unsqueeze(2)
        if not self.scale:
            return valid
        pairs = valid.sum(dim=3, keepdim=True) * (self.inner_channels // self.groups)
        return valid / pairs.clamp(min=1).sqrt()
