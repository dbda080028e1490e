"""From the settings of ``MODEL.NONLOCAL`` to blocks."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.layers import get_norm

from ..config import default_settings
from ..layers import MECHANISMS
from ..utils.validation import check_choice
from .positions import BlockFactory
from .supported_positions import check_positions

NORMS = ("", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "GN")
# Keys of MODEL.NONLOCAL that do not say what a block is.
NON_BLOCK_KEYS = ("POSITIONS", "BACKBONE", "MASK_PADDING", "VIS_PERIOD")


def position_kwargs(cfg: CfgNode, *places: str) -> dict[str, Any]:
    """The arguments ``positions`` and ``build_block`` of what takes blocks at ``places``.

    Raises:
        PositionError: if any position of the configuration, here or elsewhere, has no taker.
    """
    positions = check_positions(cfg)
    return {
        "positions": [position.text for position in positions if position.target in places],
        "make_block": nonlocal_block_factory(**_block_settings(cfg.MODEL.NONLOCAL)),
    }


def nonlocal_block_factory(**settings: Any) -> BlockFactory:
    """A function from a number of channels, and settings over these, to a block.

    Args:
        settings: keys of ``MODEL.NONLOCAL``, such as ``PAIRWISE="dot_product"``; what is not given
            has its default there.

    Raises:
        ValueError: by the function: for a setting that does not exist or a value that is no choice.
    """
    return partial(build_block, **settings)


def build_block(channels: int, **settings: Any) -> nn.Module:
    """A block for ``channels`` channels, by settings as in `nonlocal_block_factory`."""
    defaults = _block_settings(default_settings())
    for key in settings:
        check_choice("A setting", key, tuple(defaults))
    chosen = {**defaults, **settings}
    check_choice("MODEL.NONLOCAL.MECHANISM", chosen["MECHANISM"], tuple(MECHANISMS))
    reduction = chosen["REDUCTION"]
    if not isinstance(reduction, int) or not 1 <= reduction <= channels:
        raise ValueError(
            f"MODEL.NONLOCAL.REDUCTION is {reduction!r}; it divides {channels} channels, so it "
            f"must be an integer from 1 to {channels}."
        )
    mechanism = MECHANISMS[chosen["MECHANISM"]]
    arguments = {key.lower(): value for key, value in chosen.items()}
    arguments["inner_channels"] = channels // reduction
    arguments["norm"] = _norm(chosen["NORM"])
    # Each mechanism takes the settings that its constructor names.
    taken = inspect.signature(mechanism).parameters.keys() & arguments.keys()
    return mechanism(channels, **{name: arguments[name] for name in taken})


def _block_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NON_BLOCK_KEYS}


def _norm(name: str) -> Any:
    """detectron2's norms by name; the layers take a callable, or "" for none."""
    if name == "FrozenBN":
        raise ValueError(
            "MODEL.NONLOCAL.NORM is 'FrozenBN': a new block starts with a zero gamma, and a frozen "
            f"one could never learn. It must be one of {', '.join(map(repr, NORMS))}."
        )
    check_choice("MODEL.NONLOCAL.NORM", name, NORMS)
    return partial(get_norm, name) if name else ""
