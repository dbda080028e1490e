"""Building blocks from the settings of ``MODEL.NONLOCAL``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.layers import NaiveSyncBatchNorm, get_norm
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import default_settings, with_new_keys
from ..layers import MECHANISMS, GlobalContextBlock, NonLocalBlock
from ..layers.non_local import SOFTMAX
from ..utils.deprecation import warn_renamed
from ..utils.validation import check_choice
from .positions import BlockFactory
from .supported_positions import check_positions

# What a preset decides, unless a key of its own does; "recommended" is the layers' own defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "paper": {"scale": False, "norm": "BN", "init": "kaiming", "pool_first": False},
    "caffe2": {"scale": True, "norm": "BN", "init": "normal", "pool_first": True},
}
# Settings of the logits of a softmax, which other forms refuse.
_OF_LOGITS = ("scale", "qk_norm", "logit_scale")
NORMS = ("auto", "", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "GN")
# Keys of MODEL.NONLOCAL that are no settings of a block.
NON_BLOCK_KEYS = ("POSITIONS", "WRAPPED_BACKBONE", "MASK_PADDING", "VIS_PERIOD")


def position_kwargs(cfg: CfgNode, *targets: str) -> dict[str, Any]:
    """The arguments ``positions`` and ``make_block`` of a backbone or head.

    Args:
        cfg: The configuration.
        targets: Targets of positions that the backbone or head supports, such as "res4".

    Raises:
        PositionError: If any position of the configuration, also of another target, is unsupported.
    """
    positions = check_positions(cfg)
    return {
        "positions": [position.text for position in positions if position.target in targets],
        "make_block": partial(build_block, **_block_settings(cfg.MODEL.NONLOCAL)),
    }


def nonlocal_block_factory(**settings: Any) -> BlockFactory:
    """A function from a number of channels, and settings that override these, to a block.

    Args:
        settings: Keys of ``MODEL.NONLOCAL`` in lower case, such as ``pairwise="dot_product"``;
            the others have their defaults there.

    Raises:
        ValueError: When the function is called, if a setting does not exist or has a wrong value.
    """
    for key in filter(str.isupper, settings):
        warn_renamed(f"nonlocal_block_factory({key}=)", f"{key.lower()}=")
    return partial(build_block, **settings)


def build_block(channels: int, **settings: Any) -> nn.Module:
    """Build one block.

    Args:
        channels: Number of input and output channels.
        settings: Keys of ``MODEL.NONLOCAL``, in upper case as in positions or in lower case; the
            last of the same key counts.

    Raises:
        ValueError: If a setting does not exist or has a wrong value.
    """
    chosen = _complete(settings)
    check_choice("MODEL.NONLOCAL.MECHANISM", chosen["mechanism"], tuple(MECHANISMS))
    check_choice("MODEL.NONLOCAL.PRESET", chosen["preset"], tuple(PRESETS))
    reduction = chosen["reduction"]
    if not isinstance(reduction, int) or not 1 <= reduction <= channels:
        raise ValueError(
            f"MODEL.NONLOCAL.REDUCTION is {reduction!r}; it divides {channels} channels, so it "
            f"must be an integer from 1 to {channels}."
        )
    mechanism = MECHANISMS[chosen["mechanism"]]
    # Each mechanism gets the settings that its constructor names, and has its own defaults.
    names = inspect.signature(mechanism).parameters
    given = {key: value for key, value in chosen.items() if value not in (None, "auto")}
    for key in _OF_LOGITS:
        if key in given and key not in names:
            raise ValueError(
                f"MODEL.NONLOCAL.{key.upper()} is {given[key]!r}, but {chosen['mechanism']} has no "
                f"such setting; None leaves it out."
            )
    given = {**_preset(chosen), **given, "inner_channels": channels // reduction}
    if "norm" in given:
        given["norm"] = _norm(given["norm"])
    return mechanism(channels, **{key: given[key] for key in names.keys() & given.keys()})


def _preset(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What the preset decides for the chosen block; a setting that holds over it is logged."""
    preset = dict(PRESETS[chosen["preset"]])
    if not issubclass(MECHANISMS[chosen["mechanism"]], NonLocalBlock):
        return {}
    if chosen["qk_norm"] or chosen["pairwise"] not in SOFTMAX:
        preset.pop("scale", None)
    for key in [key for key in preset if chosen[key] not in (None, "auto", preset[key])]:
        _log_once(
            f"MODEL.NONLOCAL.{key.upper()} {chosen[key]!r} holds over that of the preset "
            f"{chosen['preset']!r}, {preset[key]!r}."
        )
    return preset


@cache
def _log_once(message: str) -> None:
    logging.getLogger(__name__).info(message)


def _complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a block, in lower case: the defaults and, over them, those given."""
    defaults = _block_settings(default_settings())
    chosen = {key.lower(): value for key, value in defaults.items()}
    for key, value in with_new_keys(settings).items():
        check_choice("A setting", key, tuple(defaults if key.isupper() else chosen))
        chosen[key.lower()] = value
    return _without_grouped(chosen)


def _without_grouped(chosen: dict[str, Any]) -> dict[str, Any]:
    """Settings with the former mechanism "grouped", whose GROUPS are heads, under its new name."""
    if chosen["mechanism"] != "grouped":
        return chosen
    warn_renamed("MODEL.NONLOCAL.MECHANISM 'grouped'", "'windowed', with NUM_HEADS for GROUPS")
    heads = chosen["groups"] if chosen["num_heads"] == 1 else chosen["num_heads"]
    return {**chosen, "mechanism": "windowed", "num_heads": heads}


def _block_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = with_new_keys(settings).items()
    return {key: value for key, value in kept if key not in NON_BLOCK_KEYS}


def check_batch_norms(model: nn.Module, images: int, world_size: int) -> None:
    """Check that the norm of each global context block sees several vectors in training.

    Args:
        model: Model with blocks.
        images: Number of images per process and micro-batch.
        world_size: Number of processes.

    Raises:
        ValueError: If a batch norm would see a single vector, of which it can make nothing.
    """
    for name, block in model.named_modules():
        norm = block.norm if isinstance(block, GlobalContextBlock) else None
        if isinstance(norm, _BatchNorm):
            shared = isinstance(norm, (nn.SyncBatchNorm, NaiveSyncBatchNorm))
            if images * (world_size if shared else 1) == 1:
                raise ValueError(
                    f"Batch norm in the global context block {name} sees one vector per image, and "
                    f"a batch has one image per process: set MODEL.NONLOCAL.NORM to '' or 'GN', or "
                    f"raise SOLVER.IMS_PER_BATCH."
                )


def _norm(name: str) -> Any:
    """detectron2's norm of that name, as a callable; the layers take "" for none."""
    if name == "FrozenBN":
        raise ValueError(
            "MODEL.NONLOCAL.NORM is 'FrozenBN': a new block starts with a zero gamma, and a frozen "
            f"one could never learn. It must be one of {', '.join(map(repr, NORMS))}."
        )
    check_choice("MODEL.NONLOCAL.NORM", name, NORMS)
    return partial(get_norm, name) if name else ""
