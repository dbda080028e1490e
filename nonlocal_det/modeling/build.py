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
from ..layers.base import choose
from .places import check_positions
from .positions import MakeBlock

NORMS = ("", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "GN")
# Keys of MODEL.NONLOCAL that do not say what a block is.
NOT_OF_BLOCKS = ("POSITIONS", "BACKBONE", "MASK_PADDING", "VIS_PERIOD")


def insertion_from_config(cfg: CfgNode, *places: str) -> dict[str, Any]:
    """The arguments ``positions`` and ``make_block`` of what takes blocks at ``places``.

    Raises:
        PositionError: if any position of the configuration, here or elsewhere, has no taker.
    """
    positions = check_positions(cfg)
    return {
        "positions": [position.text for position in positions if position.place in places],
        "make_block": block_maker(**_of_blocks(cfg.MODEL.NONLOCAL)),
    }


def block_maker(**settings: Any) -> MakeBlock:
    """A function from a number of channels, and settings over these, to a block.

    Args:
        settings: keys of ``MODEL.NONLOCAL``, such as ``PAIRWISE="dot_product"``; what is not given
            has its default there.

    Raises:
        ValueError: by the function: for a setting that does not exist or a value that is no choice.
    """
    return partial(make_block, **settings)


def make_block(channels: int, **settings: Any) -> nn.Module:
    """A block for ``channels`` channels, by settings as in `block_maker`."""
    defaults = _of_blocks(default_settings())
    for key in settings:
        choose("A setting", key, tuple(defaults))
    chosen = {**defaults, **settings}
    choose("MODEL.NONLOCAL.MECHANISM", chosen["MECHANISM"], tuple(MECHANISMS))
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


def _of_blocks(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NOT_OF_BLOCKS}


def _norm(name: str) -> Any:
    """detectron2's norms by name; the layers take a callable, or "" for none."""
    if name == "FrozenBN":
        raise ValueError(
            "MODEL.NONLOCAL.NORM is 'FrozenBN': a new block starts with a zero gamma, and a frozen "
            f"one could never learn. It must be one of {', '.join(map(repr, NORMS))}."
        )
    choose("MODEL.NONLOCAL.NORM", name, NORMS)
    return partial(get_norm, name) if name else ""
