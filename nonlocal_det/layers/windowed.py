"""The grouped non-local block: attention inside spatial windows, inside channel groups, or both.

Windows: space is cut into k x k cells (cells of k in one dimension) from its first corner on, and a
position looks only at the positions of its own cell, at all times where ``dims`` is 3. Cells at the
far borders may be smaller; what pads them never takes part. C(x) counts, or the softmax runs over,
the keys of the cell.

Channel groups: the embeddings are split into G groups of channels; each has an attention map of its
own, and the G results are concatenated before ``out``, as heads are.

Sources: windows as in Liu et al., "Swin Transformer", ICCV 2021 (arXiv 2103.14030), section 3.2,
without shifts and position biases; channel groups as in Vaswani et al., "Attention Is All You
Need", 2017 (arXiv 1706.03762), section 3.2.2. Everything else is the non-local block of Wang et
al., CVPR 2018: with neither windows nor groups it is `NonLocalBlock`, weight for weight.

Deviations: no subsampling; ``scale`` is by sqrt(D / G), the length of what is compared.

Cost: the sums of the softmax forms are 2 N k^2 D instead of 2 N N D (G changes their number of
maps, not their cost). Cells are copied out and back: memory O(N D).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.validation import check_positive_int
from .casting import upcast
from .masks import float_mask
from .non_local import NonLocalBlock
from .norms import Norm
from .shapes import split_channel_groups, unflatten_spatial


class WindowedNonLocalBlock(NonLocalBlock):
    """Every position adds weighted sums over its own window, one for each group of channels.

    Args:
        channels, dims, pairwise, inner_channels, norm, init: as in `NonLocalBlock`.
        window: k, the side of a window in positions, or None for all of space.
        groups: G, a divisor of D; for the Gaussian form, which compares the input, of C too.
        scale: divide the softmax logits by sqrt(D / G).

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
        window: Optional[int] = None,
        groups: int = 1,
        scale: bool = False,
        norm: Norm = "BN",
        init: str = "he",
    ) -> None:
        super().__init__(
            channels,
            dims=dims,
            pairwise=pairwise,
            inner_channels=inner_channels,
            scale=scale,
            norm=norm,
            init=init,
        )
        if window is not None:
            check_positive_int("window", window)
        divided = {"inner_channels": self.inner_channels}
        if pairwise == "gaussian":
            divided["channels"] = channels
        check_positive_int("groups", groups, divided)
        self.window = 0 if window is None else window
        self.groups = groups
        if scale:
            self.scale = (self.inner_channels // groups) ** -0.5

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """The sums of all groups, (B, D, *S)."""
        phi, g, _ = self._keys_and_values(x, None)
        y = self._attend(
            self._cut(self._queries(x), self.groups),
            self._cut(phi, self.groups),
            self._cut(g, self.groups),
            self._cut_mask(x, mask),
        )
        return self._join(y, x)

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """The mean of the groups' maps; zero outside the window of the query."""
        theta = self._split(self._queries(x), self.groups)[:, :, queries]
        phi = self._split(self._keys_and_values(x, None)[0], self.groups)
        keys, cell = float_mask(x, mask).flatten(1) > 0, self._cells(x)
        rows = [upcast(phi.new_zeros(phi.shape[0], 0, phi.shape[2]))]
        for i, query in enumerate(queries):
            near = (keys & (cell == cell[query])).repeat_interleave(self.groups, dim=0)
            rows.append(self._weights(theta[:, :, i : i + 1], phi, near))
        weights = torch.cat(rows, dim=1).unflatten(0, (x.shape[0], self.groups))
        return unflatten_spatial(weights.mean(dim=1), x)

    def _split(self, x: Tensor, groups: int) -> Tensor:
        """(B, C, *S) to (B * groups, C / groups, N)."""
        return split_channel_groups(x, groups).flatten(0, 1)

    def _cells(self, x: Tensor) -> Tensor:
        """(N,): the number of the window that each position is in."""
        if self.window == 0:
            return x.new_zeros(x.shape[2:]).flatten()
        t, h, w, k_h, k_w = self._grid(x)
        row = torch.arange(h, device=x.device) // k_h
        column = torch.arange(w, device=x.device) // k_w
        return (row[:, None] * w + column).flatten().repeat(t)

    def _grid(self, x: Tensor) -> tuple[int, int, int, int, int]:
        """The extent of x in time, height and width, and of a window in height and width."""
        t = x.shape[2] if self.dims == 3 else 1
        if self.dims == 1:
            return t, 1, x.shape[-1], 1, self.window
        return t, x.shape[-2], x.shape[-1], self.window, self.window

    def _cut(self, x: Tensor, groups: int) -> Tensor:
        """(B, C, *S) to (B * windows * groups, C / groups, positions of a window), zero-padded."""
        if self.window == 0:
            return self._split(x, groups)
        t, h, w, k_h, k_w = self._grid(x)
        b, c = x.shape[0], x.shape[1] // groups
        n_h, n_w = (h + k_h - 1) // k_h, (w + k_w - 1) // k_w
        x = F.pad(x.reshape(b, groups * c * t, h, w), [0, n_w * k_w - w, 0, n_h * k_h - h])
        x = x.reshape(b, groups, c, t, n_h, k_h, n_w, k_w).permute(0, 4, 6, 1, 2, 3, 5, 7)
        return x.reshape(b * n_h * n_w * groups, c, t * k_h * k_w)

    def _join(self, y: Tensor, x: Tensor) -> Tensor:
        """The inverse of `_cut`, for the sums over an x of (B, C, *S): (B, D, *S)."""
        if self.window == 0:
            return unflatten_spatial(y.reshape(x.shape[0], self.groups * y.shape[1], y.shape[2]), x)
        t, h, w, k_h, k_w = self._grid(x)
        b, d = x.shape[0], y.shape[1]
        n_h, n_w = (h + k_h - 1) // k_h, (w + k_w - 1) // k_w
        y = y.reshape(b, n_h, n_w, self.groups, d, t, k_h, k_w).permute(0, 3, 4, 5, 1, 6, 2, 7)
        y = y.reshape(b, self.groups * d * t, n_h * k_h, n_w * k_w)
        y = F.pad(y, [0, w - n_w * k_w, 0, h - n_h * k_h])
        return unflatten_spatial(y.reshape(b, self.groups * d, t * h * w), x)

    def _cut_mask(self, x: Tensor, mask: Optional[Tensor]) -> Optional[Tensor]:
        """The keys that take part in each window and group, (B * windows * groups, positions)."""
        if mask is None and self.window == 0:
            return None
        return (self._cut(float_mask(x, mask), 1) > 0).expand(-1, self.groups, -1).flatten(0, 1)
