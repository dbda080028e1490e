"""The base class of all non-local blocks: a residual branch that starts as the identity.

    z = x + norm(out(aggregate(x)))

Shape symbols: B batch, C channels, D inner channels; ``*S`` is one, two or three spatial
dimensions, in the order (T, H, W), (H, W) or (L,).

Masks are True at valid positions. A masked position contributes nothing to the others, counts in no
mean, and its output is its input. Of norms, this holds for group and instance norm, and for those
with fixed statistics; the statistics of a batch norm in training are those of all positions, and a
norm of one's own computes what it computes.

Precision: convolutions run in the dtype of the module, or of autocast; softmaxes, means, sums over
positions and the statistics of norms are computed in float32 or better. Values beyond the range of
float16 are clamped to +-65504 instead of becoming inf and then, in a norm or times a zero, NaN. The
output has the dtype of the input. Gradients of convolutions are PyTorch's, accumulated in the dtype
of the module where a kernel does so: float16 needs a loss scaled to its range.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn as nn
from torch import Tensor

from ..utils.deprecation import renamed_method, renamed_value
from ..utils.validation import check_choice, check_positive_int
from .casting import saturating_cast
from .masks import resize_mask
from .norms import Norm, make_norm, masked_group_norm, num_statistics_groups
from .pixel_mask import NO_PIXEL_MASK, current_pixel_mask, in_backward
from .shapes import CONV, check_input

_INITS = ("kaiming", "normal")
_RENAMED_INITS = {"he": "kaiming", "gaussian": "normal"}


def init_conv(conv: nn.Module, init: str) -> None:
    """Initialize a convolution's weights, in place, and set its bias to zero.

    Args:
        conv: The convolution.
        init: "kaiming" for `nn.init.kaiming_normal_`, or "normal" for a standard deviation of 0.01.

    Raises:
        ValueError: If ``init`` is neither.
    """
    init = renamed_value("init", init, _RENAMED_INITS)
    check_choice("init", init, _INITS)
    if init == "kaiming":
        nn.init.kaiming_normal_(conv.weight)
    else:
        nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class NonLocalBase(nn.Module):
    """Base class of all blocks: (B, C, *S) to the same shape and dtype, the identity when new.

    A subclass implements `aggregate`, which computes the inner features that the output convolution
    ``out`` projects to the input's channels, and `_attention_weights`, the weights behind them.

    Args:
        channels: Number of input and output channels, C.
        dims: Number of spatial dimensions, 1, 2 or 3.
        inner_channels: Number of inner channels, D, or None for C / ``reduction``, at least 1.
        norm: Norm after the output convolution: "BN", "SyncBN", "GN", "" for none, or a callable
            from a number of channels to a module.
        reduction: Ratio C / D where ``inner_channels`` is None.
        out_groups: Number of channel groups of the output convolution.

    Attributes:
        pixel_mask: Boolean (B, H, W) mask at the resolution of the input images, True on real
            pixels (not padding), or `NO_PIXEL_MASK`. For scripted modules, and for a mask that
            holds for all calls: a call's own mask, which `register_padding_mask_hooks` infers,
            belongs to its thread. The sign is the opposite of torch's ``key_padding_mask``.

    Raises:
        ValueError: If an argument is not one of its choices, which the message lists, or the norm
            has no learnable gamma.
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
        self._gets_masks = False  # from calls of the network around it
        self.norm = make_norm(norm, channels, dims)
        self._norm_groups = num_statistics_groups(self.norm)
        # No bias under a norm: the norm has its own.
        bias = isinstance(self.norm, nn.Identity)
        self.out = CONV[dims](inner, channels, 1, bias=bias, groups=out_groups)
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        """Zero the last learned factor of the branch: the norm's gamma, or ``out`` without a norm.

        Raises:
            ValueError: If that factor is frozen, so that the block could never learn.
        """
        if isinstance(self.norm, nn.Identity):
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
            return
        init_conv(self.out, "kaiming")
        gamma = getattr(self.norm, "weight", None)
        if not isinstance(gamma, nn.Parameter) or not gamma.requires_grad:
            raise ValueError(
                f"norm is {type(self.norm).__name__}, whose gamma cannot be learned: a new block "
                f"starts with a zero gamma and would stay zero forever. Use 'BN', 'SyncBN' or "
                f"'GN', or '' for none (then the output convolution starts at zero)."
            )
        nn.init.zeros_(gamma)
        beta = getattr(self.norm, "bias", None)
        if beta is not None:
            nn.init.zeros_(beta)

    def freeze(self) -> NonLocalBase:
        """Freeze the block permanently: no gradients, and norms keep their running statistics.

        A new block that is frozen stays the identity.

        Returns:
            The block itself.
        """
        self.requires_grad_(False)
        self.frozen = True
        return self.eval()

    def train(self, mode: bool = True) -> NonLocalBase:
        """Set training mode, unless the block is frozen: then it stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Add the non-local residual to the input.

        Args:
            x: Input features, (B, C, *S).
            mask: Boolean (B, *S), True at valid positions. None stands for the pixel mask of the
                running call or of the block, resized, or without one for all positions.

        Returns:
            Output features, (B, C, *S), in the dtype of ``x``.

        Raises:
            ValueError: If ``x`` has another number of dimensions, or the mask another shape or
                dtype.
        """
        mask = self.resolve_mask(x, mask)
        check_input(x, mask, self.dims)
        return self._add_branch(x, self.aggregate(x, mask), mask)

    def forward_with_keys(self, x: Tensor, keys: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """What `forward` computes if only some positions can be attended to.

        All valid positions remain queries, and count in the statistics of norms.

        Args:
            x: Input features, (B, C, *S).
            keys: Boolean (B, *S), True at the positions that can be attended to.
            mask: As of `forward`; what it excludes cannot be attended to either.

        Returns:
            Output features, (B, C, *S), in the dtype of ``x``.

        Raises:
            ValueError: If ``x`` has another number of dimensions, or a mask another shape or dtype.
        """
        mask = self.resolve_mask(x, mask)
        check_input(x, mask, self.dims)
        check_input(x, keys, self.dims)
        return self._add_branch(x, self.aggregate(x, keys if mask is None else keys & mask), mask)

    def _add_branch(self, x: Tensor, y: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Project inner features y, (B, D, *S) or (B, D, 1, ...), and add them to the input."""
        branch = self.out(y)
        branch = self._normalize(saturating_cast(branch, branch.dtype), mask)
        z = saturating_cast(x + branch.to(x.dtype), x.dtype)
        return z if mask is None else torch.where(mask.unsqueeze(1), z, x)

    def _normalize(self, branch: Tensor, mask: Optional[Tensor]) -> Tensor:
        if hasattr(self.norm, "eps") and self._norm_groups > 0:
            if mask is not None and branch.shape[2:] == mask.shape[1:]:
                norm = self.norm
                return masked_group_norm(
                    branch, mask, self._norm_groups, norm.weight, norm.bias, norm.eps
                )
        return self.norm(branch)

    def resolve_mask(self, x: Tensor, mask: Optional[Tensor]) -> Optional[Tensor]:
        """The mask (B, *S) that `forward` uses for these arguments, or None for all positions."""
        if mask is not None:
            return mask
        pixel_mask = self.pixel_mask
        if not torch.jit.is_scripting():
            pixel_mask = self._pixel_mask_of_call(x)
        return resize_mask(pixel_mask, x) if pixel_mask.dim() == 3 else None

    def _pixel_mask_of_call(self, x: Tensor) -> Tensor:
        mask = current_pixel_mask(x)
        if mask is not None:
            self._gets_masks = True
            return mask
        if self._gets_masks and in_backward():
            raise RuntimeError(
                f"{type(self).__name__} runs again in the backward pass, without the mask of the "
                f"padding. Checkpoint a call of whole modules, such as a stage of the backbone."
            )
        return self.pixel_mask

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Compute the inner features that ``out`` projects back to the input's channels.

        Args:
            x: Input features, (B, C, *S).
            mask: Boolean (B, *S), True at valid positions, or None for all.

        Returns:
            Inner features, (B, D, *S), or (B, D, 1, ...) if all positions share them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define aggregate.")

    def attention_weights(
        self, x: Tensor, queries: Tensor, mask: Optional[Tensor] = None
    ) -> Tensor:
        """Compute the attention weights of chosen query positions over all keys, and no others.

        Args:
            x: Input features, (B, C, *S).
            queries: Integer (Q,), query positions as row-major indices into S.
            mask: Boolean (B, *S), True at valid positions, or None for all.

        Returns:
            Attention weights, (B, Q, *K), where K is the spatial shape of the keys: S, or S
            subsampled, rounded up.

        Raises:
            ValueError: If ``x`` has another number of dimensions, or the mask another shape or
                dtype.
        """
        check_input(x, mask, self.dims)
        return self._attention_weights(x, queries, mask)

    def _attention_weights(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Compute what `attention_weights` returns, from arguments already checked."""
        raise NotImplementedError(f"{type(self).__name__} does not define _attention_weights.")

    attention = renamed_method("attention", "attention_weights")
