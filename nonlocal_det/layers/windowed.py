"""The windowed non-local block: attention inside spatial windows, with several heads, or both.

Windows: space is divided into k x k windows (of k in one dimension) from its first corner on, and a
position attends only to the positions of its own window, at all times if ``dims`` is 3. Windows at
the far borders may be smaller; their padding is masked. C(x) counts, or the softmax runs over, the
keys of the window.

Heads: the embeddings are split into H groups of channels; each head has its own attention map, and
the H results are concatenated before ``out``.

Sources: windows as in Liu et al., "Swin Transformer", ICCV 2021 (arXiv 2103.14030), section 3.2,
without shifts and position biases; heads as in Vaswani et al., "Attention Is All You Need", 2017
(arXiv 1706.03762), section 3.2.2. Everything else is the non-local block of Wang et al., CVPR 2018:
without windows and with one head it is `NonLocalBlock`, weight for weight.

Deviations: no subsampling; ``scale`` divides by sqrt(D / H), the width of a head.

Cost: softmax attention takes 2 N k^2 D multiplications instead of 2 N N D (H changes the number of
maps, not the cost). Windows are copied out and back: memory O(N D).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.deprecation import renamed_arguments
from ..utils.validation import check_positive_int
from .casting import upcast
from .masks import float_mask
from .non_local import NonLocalBlock
from .norms import Norm
from .shapes import split_channel_groups, unflatten_spatial


class WindowedNonLocalBlock(NonLocalBlock):
    """Windowed multi-head non-local block: each position adds weighted sums over its own window.

    Args:
        channels: Number of input and output channels, C.
        dims: Number of spatial dimensions, 1, 2 or 3.
        pairwise: Pairwise function, one of ``PAIRWISE``.
        inner_channels: Number of inner channels, D; half of ``channels`` by default, at least 1.
        window_size: Side of a window in positions, k, or None for a single window over all of
            space.
        num_heads: Number of heads, H, a divisor of D; with the Gaussian function, which compares
            the input itself, a divisor of C too.
        scale: Whether to divide the softmax logits by sqrt(D / H); see `NonLocalBlock`.
        qk_norm: Whether to scale each head's queries and keys to unit length; see `NonLocalBlock`.
        logit_scale: Initial factor of the cosines; see `NonLocalBlock`.
        norm: Norm after the output convolution; see `NonLocalBlock`.
        init: Initialization of the embeddings; see `NonLocalBlock`.

    Raises:
        ValueError: If an argument is not one of its choices, which the message lists.
    """

    @renamed_arguments(window="window_size", groups="num_heads")
    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        pairwise: str = "embedded_gaussian",
        inner_channels: Optional[int] = None,
        window_size: Optional[int] = None,
        num_heads: int = 1,
        scale: Optional[bool] = None,
        qk_norm: Optional[bool] = None,
        logit_scale: Optional[float] = None,
        norm: Norm = "BN",
        init: str = "kaiming",
    ) -> None:
        super().__init__(
            channels,
            dims=dims,
            pairwise=pairwise,
            inner_channels=inner_channels,
            scale=scale,
            qk_norm=qk_norm,
            logit_scale=logit_scale,
            norm=norm,
            init=init,
        )
        if window_size is not None:
            check_positive_int("window_size", window_size)
        divided = {"inner_channels": self.inner_channels}
        if pairwise == "gaussian":
            divided["channels"] = channels
        check_positive_int("num_heads", num_heads, divided)
        self.window_size = 0 if window_size is None else window_size
        self.num_heads = num_heads
        if scale:
            self.scale = (self.inner_channels // num_heads) ** -0.5

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Attention output of all heads, (B, D, *S)."""
        phi, g, _ = self._keys_and_values(x, None)
        y = self._attend(
            self._partition(self._queries(x), self.num_heads),
            self._partition(phi, self.num_heads),
            self._partition(g, self.num_heads),
            self._partition_mask(x, mask),
        )
        return self._merge(y, x)

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Mean of the heads' weights; zero outside the window of the query."""
        theta = self._split(self._queries(x), self.num_heads)[:, :, queries]
        phi = self._split(self._keys_and_values(x, None)[0], self.num_heads)
        keys, window = float_mask(x, mask).flatten(1) > 0, self._windows(x)
        rows = [upcast(phi.new_zeros(phi.shape[0], 0, phi.shape[2]))]
        for i, query in enumerate(queries):
            near = (keys & (window == window[query])).repeat_interleave(self.num_heads, dim=0)
            rows.append(self._weights(theta[:, :, i : i + 1], phi, near))
        weights = torch.cat(rows, dim=1).unflatten(0, (x.shape[0], self.num_heads))
        return unflatten_spatial(weights.mean(dim=1), x)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(B, C, *S) to (B * heads, C / heads, N)."""
        return split_channel_groups(x, heads).flatten(0, 1)

    def _windows(self, x: Tensor) -> Tensor:
        """(N,): index of the window that each position is in."""
        if self.window_size == 0:
            return x.new_zeros(x.shape[2:]).flatten()
        t, h, w, k_h, k_w = self._grid(x)
        row = torch.arange(h, device=x.device) // k_h
        column = torch.arange(w, device=x.device) // k_w
        return (row[:, None] * w + column).flatten().repeat(t)

    def _grid(self, x: Tensor) -> tuple[int, int, int, int, int]:
        """Size of x in time, height and width, and of a window in height and width."""
        t = x.shape[2] if self.dims == 3 else 1
        if self.dims == 1:
            return t, 1, x.shape[-1], 1, self.window_size
        return t, x.shape[-2], x.shape[-1], self.window_size, self.window_size

    def _partition(self, x: Tensor, heads: int) -> Tensor:
        """(B, C, *S) to (B * windows * heads, C / heads, positions of a window), zero-padded."""
        if self.window_size == 0:
            return self._split(x, heads)
        t, h, w, k_h, k_w = self._grid(x)
        b, c = x.shape[0], x.shape[1] // heads
        n_h, n_w = (h + k_h - 1) // k_h, (w + k_w - 1) // k_w
        x = F.pad(x.reshape(b, heads * c * t, h, w), [0, n_w * k_w - w, 0, n_h * k_h - h])
        x = x.reshape(b, heads, c, t, n_h, k_h, n_w, k_w).permute(0, 4, 6, 1, 2, 3, 5, 7)
        return x.reshape(b * n_h * n_w * heads, c, t * k_h * k_w)

    def _merge(self, y: Tensor, x: Tensor) -> Tensor:
        """Inverse of `_partition`, for the attention output over x (B, C, *S): (B, D, *S)."""
        if self.window_size == 0:
            return unflatten_spatial(
                y.reshape(x.shape[0], self.num_heads * y.shape[1], y.shape[2]), x
            )
        t, h, w, k_h, k_w = self._grid(x)
        b, d = x.shape[0], y.shape[1]
        n_h, n_w = (h + k_h - 1) // k_h, (w + k_w - 1) // k_w
        y = y.reshape(b, n_h, n_w, self.num_heads, d, t, k_h, k_w).permute(0, 3, 4, 5, 1, 6, 2, 7)
        y = y.reshape(b, self.num_heads * d * t, n_h * k_h, n_w * k_w)
        y = F.pad(y, [0, w - n_w * k_w, 0, h - n_h * k_h])
        return unflatten_spatial(y.reshape(b, self.num_heads * d, t * h * w), x)

    def _partition_mask(self, x: Tensor, mask: Optional[Tensor]) -> Optional[Tensor]:
        """Valid keys of each window and head, (B * windows * heads, positions of a window)."""
        if mask is None and self.window_size == 0:
            return None
        return (
            (self._partition(float_mask(x, mask), 1) > 0)
            .expand(-1, self.num_heads, -1)
            .flatten(0, 1)
        )
