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

import math
from typing import Callable, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .precision import narrow, widen

Norm = Union[str, Callable[[int], nn.Module]]

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_NORMS = ("", "BN", "SyncBN", "GN")
_INITS = ("he", "gaussian")
NO_MASK = torch.zeros(0, dtype=torch.bool)  # TorchScript wants a tensor where there can be one


def choose(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError that lists the choices unless ``value`` is one of them."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} is {value!r}; it must be one of {listed}.")


def check_count(name: str, value: object, divides: Optional[dict[str, int]] = None) -> None:
    """Raise a ValueError unless ``value`` is a positive integer that divides the numbers named."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
    for other, number in (divides or {}).items():
        if number % value:
            raise ValueError(f"{name} is {value}; it must divide {other}, which is {number}.")


def make_norm(norm: Norm, channels: int, dims: int) -> nn.Module:
    """The norm named (one of "", "BN", "SyncBN", "GN") or made by the callable, for (B, C, *S).

    "GN" has 32 groups, or as many as divide both 32 and ``channels``.
    """
    if callable(norm):
        return norm(channels)
    choose("norm", norm, _NORMS)
    if norm == "BN":
        return _BATCH_NORM[dims](channels)
    if norm == "SyncBN":
        return nn.SyncBatchNorm(channels)
    if norm == "GN":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return nn.Identity()


def init_conv(conv: nn.Module, init: str) -> None:
    """Fill a convolution: "he", as papers say, or "gaussian", of std 0.01; its bias with zeros."""
    choose("init", init, _INITS)
    if init == "he":
        nn.init.kaiming_normal_(conv.weight)
    else:
        nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def check_input(x: Tensor, mask: Optional[Tensor], dims: int) -> None:
    """Raise a ValueError unless ``x`` is (B, C, *S) and ``mask`` a boolean (B, *S), or None."""
    if x.dim() != dims + 2:
        raise ValueError(
            f"x has {x.dim()} dimensions; a block with dims={dims} takes {dims + 2}: "
            "batch, channels, space."
        )
    if mask is not None:
        expected = x.shape[:1] + x.shape[2:]
        if mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(
                f"mask is {mask.dtype} of shape {list(mask.shape)}; it must be boolean "
                f"of shape {list(expected)}, True where a position takes part."
            )


def pool(x: Tensor, stride: int, mask: Optional[Tensor]) -> Tensor:
    """Max-pool (B, C, *S) by ``stride`` in space, over the positions that ``mask`` leaves.

    Borders are rounded up. The first of three dimensions is time and stays. A cell without a
    position that takes part becomes 0.
    """
    if stride == 1:
        return x
    if mask is None:
        return _max_pool(x, stride)
    pooled = _max_pool(x.masked_fill(~mask.unsqueeze(1), float("-inf")), stride)
    # By the mask: onnxruntime has kernels that do not give -inf for a cell of nothing but -inf.
    return pooled.masked_fill(_max_pool(share(x, mask), stride) == 0, 0.0)


def _max_pool(x: Tensor, stride: int) -> Tensor:
    if x.dim() == 3:
        return F.max_pool1d(x, stride, ceil_mode=True)
    if x.dim() == 4:
        return F.max_pool2d(x, stride, ceil_mode=True)
    return F.max_pool3d(x, [1, stride, stride], ceil_mode=True)


def key_mask(mask: Optional[Tensor], stride: int = 1) -> Optional[Tensor]:
    """(B, *S) to (B, M): the cells of `pool` with at least one position that takes part."""
    if mask is None:
        return None
    if stride > 1:
        mask = _max_pool(mask.unsqueeze(1).float(), stride) > 0
    return mask.flatten(1)


def at_resolution(image_mask: Tensor, x: Tensor) -> Tensor:
    """(B, H, W) at the resolution of the images to that of x, (B, C, h, w).

    A network that rounds up what it halves has, at stride s, the cells whose first pixel is a
    multiple of s. Of another network it is the nearest pixel.
    """
    mask = image_mask
    while mask.shape[1] > x.shape[2]:
        mask = mask[:, ::2, ::2]
    if mask.shape[1:] == x.shape[2:]:
        return mask
    return F.interpolate(image_mask.unsqueeze(1).float(), x.shape[2:]).squeeze(1) > 0


def share(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    """(B, 1, *S) in the dtype of x (B, C, *S): 1 where a position takes part, 0 elsewhere."""
    return torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x.dtype)


# ONNX's opset 11, to which detectron2 exports, has no unflatten.


def in_groups(x: Tensor, groups: int) -> Tensor:
    """(B, C, *S) to (B, groups, C / groups, N)."""
    flat = x.flatten(2)
    return flat.reshape([x.shape[0], groups, x.shape[1] // groups, flat.shape[2]])


def in_space(x: Tensor, like: Tensor) -> Tensor:
    """(B, D, N) to (B, D, *S), as in ``like``, (B, C, *S)."""
    return x.reshape(x.shape[:2] + like.shape[2:])


def masked_group_norm(
    x: Tensor, mask: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`F.group_norm` of (B, C, *S), with the statistics of the positions that take part."""
    grouped = in_groups(widen(x), groups)
    part = mask.flatten(1).unsqueeze(1).unsqueeze(1).to(grouped.dtype)
    count = (part.sum(dim=3, keepdim=True) * grouped.shape[2]).clamp(min=1)
    centred = grouped - (grouped * part).sum(dim=[2, 3], keepdim=True) / count
    variance = (centred.square() * part).sum(dim=[2, 3], keepdim=True) / count
    y = (centred * (variance + eps).rsqrt()).flatten(1, 2)
    y = y * weight.unsqueeze(1) + bias.unsqueeze(1)
    return y.view_as(x).to(x.dtype)


class NonLocalBase(nn.Module):
    """A mechanism's frame: (B, C, *S) in, the same shape and dtype out, the identity when new.

    A mechanism writes `aggregate`, which gives the inner features that ``out`` brings back to the
    input's channels, and `rows`, which gives the weights behind them.

    Args:
        channels: C, of input and output.
        dims: number of spatial dimensions, 1, 2 or 3.
        inner_channels: D, or None for C / ``reduction``, at least 1.
        norm: after the output convolution: "BN", "SyncBN", "GN", "" for none, or a callable from
            a number of channels to a module.
        reduction: C / D where ``inner_channels`` is None.
        out_groups: channel groups of the output convolution.

    Attributes:
        image_mask: boolean (B, H, W) at the resolution of the images, or `NO_MASK`. Whoever runs
            the block where no mask can be passed, as in an ``nn.Sequential``, sets it for the time.

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
        choose("dims", dims, (1, 2, 3))
        check_count("channels", channels)
        inner = max(channels // reduction, 1) if inner_channels is None else inner_channels
        check_count("inner_channels", inner)
        check_count("groups", out_groups, {"channels": channels, "inner_channels": inner})
        self.channels = channels
        self.dims = dims
        self.inner_channels = inner
        self.frozen = False
        self.image_mask = NO_MASK
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
                ``image_mask`` says, or all.

        Returns:
            (B, C, *S), in the dtype of ``x``.

        Raises:
            ValueError: for an ``x`` of other dimensions, or a mask of another shape or dtype.
        """
        mask = self.mask_of(x, mask)
        check_input(x, mask, self.dims)
        branch = self.out(self.aggregate(x, mask))
        branch = self._normalise(narrow(branch, branch.dtype), mask)
        z = narrow(x + branch.to(x.dtype), x.dtype)
        return z if mask is None else torch.where(mask.unsqueeze(1), z, x)

    def _normalise(self, branch: Tensor, mask: Optional[Tensor]) -> Tensor:
        # The one norm whose statistics at inference are the picture's own.
        if hasattr(self.norm, "num_groups"):
            if mask is not None and branch.shape[2:] == mask.shape[1:]:
                norm = self.norm
                return masked_group_norm(
                    branch, mask, norm.num_groups, norm.weight, norm.bias, norm.eps
                )
        return self.norm(branch)

    def mask_of(self, x: Tensor, mask: Optional[Tensor]) -> Optional[Tensor]:
        """The mask (B, *S) with which `forward` runs when it is called with these."""
        if mask is None and self.image_mask.dim() == 3:
            return at_resolution(self.image_mask, x)
        return mask

    def aggregate(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """(B, C, *S) and a mask (B, *S) or None to (B, D, *S), or (B, D, 1, ...) for all alike."""
        raise NotImplementedError(f"{type(self).__name__} does not define aggregate.")

    def attention(self, x: Tensor, queries: Tensor, mask: Optional[Tensor] = None) -> Tensor:
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
        return self.rows(x, queries, mask)

    def rows(self, x: Tensor, queries: Tensor, mask: Optional[Tensor]) -> Tensor:
        """What `attention` returns, for arguments already checked."""
        raise NotImplementedError(f"{type(self).__name__} does not define rows.")
