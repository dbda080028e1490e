"""Blocks of other packages that compute what ours compute, with the same weights.

Nothing but the benchmark uses these packages, and each is imported where its block is built. A peer
and our block are configured so that they are one function; where the other package has no such
setting, it is in `NOT_COMPARABLE`. The packages round sizes down when they pool, ours rounds up:
with ``subsample`` they are one function for even sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import nn

from ..checkpoint.convert import (
    convert_mmcv,
    convert_mmcv_context,
    convert_pytorchvideo,
    convert_timm,
    convert_timm_context,
)
from ..errors import summarize_error
from ..layers import PAIRWISE, GlobalContextBlock, NonLocalBlock

GLOBAL_CONTEXT = "global_context"

# Why blocks of these packages that look alike are not compared.
NOT_COMPARABLE = {
    "timm BatNonLocalAttn": "it transforms rows and columns of a pooled map, and compares no pairs "
    "of positions",
}

Pair = tuple[nn.Module, nn.Module]


@dataclass(frozen=True)
class Setting:
    """What a peer's block and ours have in common.

    Attributes:
        channels: Number of input and output channels, C.
        inner_channels: Number of inner channels, D.
        pairwise: Pairwise function, or `GLOBAL_CONTEXT`.
        subsample: Whether keys and values are max-pooled by 2.
    """

    channels: int
    inner_channels: int
    pairwise: str
    subsample: bool


@dataclass(frozen=True)
class Peer:
    """A block of another package.

    Attributes:
        module: Module that has the block.
        block: Name of the block in it.
        distribution: Name under which pip installs the package.
        pairwise: Pairwise functions that it has, or `GLOBAL_CONTEXT`.
        subsample: Whether it pools keys and values: what it has of False and True.
        make_pair: Function that builds our block and the peer's, for one (C, H, W) function: both
            have the same random weights, and a norm where the peer has or may have one.
    """

    module: str
    block: str
    distribution: str
    pairwise: tuple[str, ...]
    subsample: tuple[bool, ...]
    make_pair: Callable[[Setting], Pair]

    @property
    def package(self) -> str:
        """Name under which the package is imported."""
        return self.module.partition(".")[0]

    @property
    def name(self) -> str:
        """Name in `PEERS` and in reports."""
        return f"{self.package} {self.block}"


def _mmcv_non_local(setting: Setting) -> Pair:
    from mmcv.cnn import NonLocal2d

    common = {"sub_sample": setting.subsample, "norm_cfg": {"type": "BN"}}
    reduction = setting.channels // setting.inner_channels
    theirs = NonLocal2d(setting.channels, reduction=reduction, mode=setting.pairwise, **common)
    ours = _our_non_local(setting, scale=setting.pairwise == "embedded_gaussian")
    ours.load_state_dict(convert_mmcv(_randomized(theirs).state_dict()))
    return ours, theirs


def _pytorchvideo_non_local(setting: Setting) -> Pair:
    from pytorchvideo.layers.nonlocal_net import create_nonlocal

    softmax = setting.pairwise == "embedded_gaussian"
    theirs = create_nonlocal(
        dim_in=setting.channels,
        dim_inner=setting.inner_channels,
        pool_size=(1, 2, 2) if setting.subsample else None,
        instantiation="softmax" if softmax else "dot_product",
    )
    ours = _our_non_local(setting, scale=softmax, pool_first=True)
    ours.load_state_dict(convert_pytorchvideo(_randomized(theirs).state_dict(), dims=2))
    # An image is a clip of one frame.
    return ours, nn.Sequential(nn.Unflatten(2, (1, -1)), theirs, nn.Flatten(2, 3))


def _timm_non_local(setting: Setting) -> Pair:
    from timm.layers import NonLocalAttn

    theirs = NonLocalAttn(setting.channels, rd_channels=setting.inner_channels)
    ours = _our_non_local(setting, scale=False)  # theta has the scale
    ours.load_state_dict(convert_timm(_randomized(theirs).state_dict()))
    return ours, theirs


def _mmcv_context(setting: Setting) -> Pair:
    from mmcv.cnn import ContextBlock

    # It truncates channels times ratio, which may be just below the integer.
    ratio = (setting.inner_channels + 0.5) / setting.channels
    theirs = ContextBlock(setting.channels, ratio=ratio)
    ours = GlobalContextBlock(setting.channels, inner_channels=setting.inner_channels)
    ours.load_state_dict(convert_mmcv_context(_randomized(theirs).state_dict()))
    return ours, theirs


def _timm_context(setting: Setting) -> Pair:
    from timm.layers import GlobalContext

    inner = setting.inner_channels
    theirs = GlobalContext(setting.channels, fuse_add=True, fuse_scale=False, rd_channels=inner)
    ours = GlobalContextBlock(setting.channels, inner_channels=inner)
    theirs.mlp_add.norm.eps = ours.layer_norm.eps  # 1e-5, as in GCNet; timm's own is 1e-6
    ours.load_state_dict(convert_timm_context(_randomized(theirs).state_dict()))
    return ours, theirs


def _our_non_local(setting: Setting, **options: bool) -> NonLocalBlock:
    return NonLocalBlock(
        setting.channels,
        inner_channels=setting.inner_channels,
        pairwise=setting.pairwise,
        subsample=setting.subsample,
        **options,
    )


def _randomized(block: nn.Module) -> nn.Module:
    """Give a block, which is the identity when new, random weights that keep features' size."""
    for name, parameter in block.named_parameters():
        # Larger biases would make most of the features the same at all positions.
        std = 0.1 if name.endswith("bias") else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=std)
    for name, buffer in block.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return block


_NO, _BOTH = (False,), (False, True)
_SOFTMAX, _CONTEXT = ("embedded_gaussian",), (GLOBAL_CONTEXT,)
_SOFTMAX_OR_PRODUCT, _VIDEO = (*_SOFTMAX, "dot_product"), "pytorchvideo.layers.nonlocal_net"
_ALL = (
    Peer("mmcv.cnn", "NonLocal2d", "mmcv-lite", PAIRWISE, _BOTH, _mmcv_non_local),
    Peer(_VIDEO, "NonLocal", "pytorchvideo", _SOFTMAX_OR_PRODUCT, _BOTH, _pytorchvideo_non_local),
    Peer("timm.layers", "NonLocalAttn", "timm", _SOFTMAX, _NO, _timm_non_local),
    Peer("mmcv.cnn", "ContextBlock", "mmcv-lite", _CONTEXT, _NO, _mmcv_context),
    Peer("timm.layers", "GlobalContext", "timm", _CONTEXT, _NO, _timm_context),
)
PEERS = {peer.name: peer for peer in _ALL}


def import_peers() -> tuple[dict[str, str], str]:
    """Import the peers.

    Returns:
        The versions of their packages by name in `PEERS`, of those that can be imported; and the
        others with a line that installs them, as a sentence, or "".

    Raises:
        RuntimeError: If none can be imported; the message has the line that installs them.
    """
    versions, errors = {}, {}
    for name, peer in PEERS.items():
        try:
            getattr(import_module(peer.module), peer.block)
            versions[name] = import_module(peer.package).__version__
        except Exception as error:  # whatever another package raises
            errors[peer.distribution] = summarize_error(error)
    reasons = ", ".join(f"{name} ({error})" for name, error in errors.items())
    missing = f"cannot import {reasons}; install with: pip install {' '.join(errors)}"
    if not versions:
        raise RuntimeError(f"--peers {missing}")
    return versions, f"Not compared: {missing}" if errors else ""
