"""What every non-local mechanism shares: a residual branch that starts as the identity.

    z = x + norm(out(aggregate(x)))

Letters of shapes: B batch, C channels, D inner channels; ``*S`` is one, two or three spatial
dimensions, in the order (T, H, W), (H, W) or (L,).

Masks say which positions take part. One that does not gives nothing to the others, counts in no
mean, and comes out as it went in. (The running statistics of a batch norm in training are those of
all positions.)

Precision: convolutions run in the dtype of the module, or of autocast; softmaxes, means, sums over
positions and the statistics of norms are float32 or better, whatever these are. What would exceed
the range of float16 stays at its end, 65504, instead of becoming inf and then, in a norm or times a
zero, NaN. The output has the dtype of the input.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn as nn
from torch import Tensor

from ..utils.validation import check_choice, check_positive_int
from .casting import saturating_cast
from .masks import resize_mask
from .norms import Norm, make_norm, masked_group_norm
from .shapes import CONV, check_input

_INITS = ("he", "gaussian")
# TorchScript wants a tensor where there can be one.
NO_PIXEL_MASK = torch.zeros(0, dtype=torch.bool)


def init_conv(conv: nn.Module, init: str) -> None:
    """Fill a convolution: "he", as papers say, or "gaussian", of std 0.01; its bias with zeros."""
    check_choice("init", init, _INITS)
    if init == "he":
        nn.init.kaiming_normal_(conv.weight)
    else:
        nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class NonLocalBase(nn.Module):
    """A mechanism's frame: (B, C, *S) in, the same shape and dtype out, the identity when new.

    A mechanism writes `aggregate`, which gives the inner features that ``out`` brings back to the
    input's channels, and `_attention_weights`, which gives the weights behind them.

    Args:
        channels: C, of input and output.
        dims: number of spatial dimensions, 1, 2 or 3.
        inner_channels: D, or None for C / ``reduction``, at least 1.
        norm: after the output convolution: "BN", "SyncBN", "GN", "" for none, or a callable from
            a number of channels to a module.
        reduction: C / D where ``inner_channels`` is None.
        out_groups: channel groups of the output convolution.

    Attributes:
        pixel_mask: Boolean (B, H, W) mask at the resolution of the input images, True on real
            pixels, or `NO_PIXEL_MASK`. Set temporarily where no mask can be passed to `forward`,
            as inside an ``nn.Sequential``.

    Raises:
        ValueError: for a value that is not a choice, with the choices; for a norm whose gamma
            cannot learn.
    """

    def __init__(
        self,
        channels: int,
        *,
        dims: int,
        inner_channels: Optional[int],
        norm: Norm,
        reduction: int = 2,
        out_groups: int = 1,
    ) -> None:
        super().__init__()
        check_choice("dims", dims, (1, 2, 3))
        check_positive_int("channels", channels)
        inner = max(channels // reduction, 1) if inner_channels is None else inner_channels
        check_positive_int("inner_channels", inner)
        check_positive_int("groups", out_groups, {"channels": channels, "inner_channels": inner})
        self.channels = channels
        self.dims = dims
        self.inner_channels = inner
        self.frozen = False
        self.pixel_mask = NO_PIXEL_MASK
        self.norm = make_norm(norm, channels, dims)
        # No bias under a norm: the norm has its own.
        bias = isinstance(self.norm, nn.Identity)
        self.out = CONV[dims](inner, channels, 1, bias=bias, groups=out_groups)
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        """Zero the last learned factor of the branch: the norm's gamma, or ``out`` without a norm.

        Raises:
            ValueError: if that factor is frozen, so that the block could never learn.
        """
        if isinstance(self.norm, nn.Identity):
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
            return
        init_conv(self.out, "he")
        gamma = getattr(self.norm, "weight", None)
        if not isinstance(gamma, nn.Parameter) or not gamma.requires_grad:
            raise ValueError(
                f"norm is {type(self.norm).__name__}, whose gamma cannot be learned: a new block "
                f"starts with a zero gamma and would stay zero for ever. Use 'BN', 'SyncBN' or "
                f"'GN', or '' for none (then the output convolution starts at zero)."
            )
        nn.init.zeros_(gamma)
        beta = getattr(self.norm, "bias", None)
        if beta is not None:
            nn.init.zeros_(beta)

    def freeze(self) -> NonLocalBase:
        """Stop learning for good: no gradients, and norms keep their running statistics.

        A new block that is frozen stays the identity.
        """
        self.requires_grad_(False)
        self.frozen = True
        return self.eval()

    def train(self, mode: bool = True) -> NonLocalBase:
        """Set training mode, unless the block is frozen: then it stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Add what the positions gather from each other.

        Args:
            x: (B, C, *S).
            mask: boolean (B, *S), True where a position takes part, or None for what
                ``pixel_mask`` says, or all.

        Returns:
            (B, C, *S), in the dtype of ``x``.

        Raises:
            ValueError: for an ``x`` of other dimensions, or a mask of another shape or dtype.
        """
        mask = self.resolve_mask(x, mask)
        check_input(x, mask, self.dims)
        branch = self.out(self.aggregate(x, mask))
        branch = self._normalize(saturating_cast(branch, branch.dtype), mask)
        z = saturating_cast(x + branch.to(x.dtype), x.dtype)
        return z if mask is None else torch.where(mask.unsqueeze(1), z, x)

    def _normalize(self, branch: Tensor, mask: Optional[Tensor]) -> Tensor:
        # The one norm whose statistics at inference are the picture's own.
        if hasattr(self.norm, "num_groups"):
            if mask is not None and branch.shape[2:] == mask.shape[1:]:
                norm = self.norm
                return masked_group_norm(
                    branch, mask, norm.num_groups, norm.weight, norm.bias, norm.eps
                )
        return self.norm(branch)

    def resolve_mask(self, x: Tensor, mask: Optional[Tensor]) -> Optional[Tensor]:
        """The mask (B, *S) with which `forward` runs when it is called with these."""
        if mask is None and self.pixel_mask.dim() == 3:
            return resize_mask(self.pixel_mask, x)
        return mask

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """(B, C, *S) and a mask (B, *S) or None to (B, D, *S), or (B, D, 1, ...) for all alike."""
        raise NotImplementedError(f"{type(self).__name__} does not define aggregate.")

    def attention_weights(
        self, x: Tensor, queries: Tensor, mask: Optional[Tensor] = None
    ) -> Tensor:
        """The weights with which chosen positions look at all keys; only those rows are computed.

        Args:
            x: (B, C, *S), the block's input.
            queries: integer (Q,), positions counted in row-major order over S.
            mask: as in `forward`.

        Returns:
            (B, Q, *K), K the spatial shape of the keys: S, or S subsampled, rounded up.

        Raises:
            ValueError: as `forward`.
        """
        check_input(x, mask, self.dims)
        return self._attention_weights(x, queries, mask)

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """What `attention_weights` returns, for arguments already checked."""
        raise NotImplementedError(f"{type(self).__name__} does not define rows.")
