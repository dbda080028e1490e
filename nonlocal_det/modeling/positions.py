"""Positions, ``"res4[-2]"``, and the insertion of blocks after what they select.

A position is a place, an index or slice in Python's own syntax where the place holds several
things, and settings of its own where it needs any: ``"res3[1::2] PAIRWISE=dot_product"``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Union

import torch
import torch.nn as nn

BlockFactory = Callable[..., nn.Module]

_SYNTAX = re.compile(r"(?P<target>[\w.\-]+)(\[(?P<index>[-+:\d\s]*)\])?(?P<settings>(\s+\w+=\S+)*)")
_EXAMPLES = "'res4[-2]', 'res3[1::2]', 'p3', 'mask_head[-1]', 'res3[:] PAIRWISE=dot_product'"


class PositionError(ValueError):
    """A position that cannot be read, that the model does not have, or that nothing consumes."""


@dataclass(frozen=True)
class Position:
    """One entry of ``MODEL.NONLOCAL.POSITIONS``."""

    text: str
    target: str
    index: Union[int, slice, None] = None
    settings: dict[str, Any] = field(default_factory=dict)

    def select(self, names: Sequence[str], what: str) -> list[str]:
        """Those of ``names`` that the index selects; ``what`` says in the plural what they are.

        Raises:
            PositionError: if there is no index, or it selects nothing.
        """
        if self.index is None:
            raise PositionError(
                f"Position {self.text!r}: {self.target} has {len(names)} {what}; say after which, "
                f"as in '{self.target}[-1]' or '{self.target}[:]'."
            )
        try:
            selected = names[self.index]
        except IndexError:
            selected = []
        if not selected:
            span = f"from 0 to {len(names) - 1}, or -1 to -{len(names)} from the end"
            there = f"indices go {span}" if names else "there is no place to insert"
            raise PositionError(
                f"Position {self.text!r} selects nothing: {self.target} has {len(names)} {what}; "
                f"{there}."
            )
        return [selected] if isinstance(selected, str) else list(selected)


def parse_position(text: str) -> Position:
    """Read one position.

    Raises:
        PositionError: if it does not follow the syntax, with examples that do.
    """
    match = _SYNTAX.fullmatch(text.strip()) if isinstance(text, str) else None
    index = None
    if match and match["index"] is not None:
        index = _parse_index(match["index"])
    if match is None or (match["index"] is not None and index is None):
        raise PositionError(
            f"{text!r} is not a position. Write a place and, where it holds several things, an "
            f"index or slice: {_EXAMPLES}."
        )
    pairs = (setting.split("=", 1) for setting in match["settings"].split())
    return Position(text, match["target"], index, {key: _literal(value) for key, value in pairs})


def _parse_index(text: str) -> Union[int, slice, None]:
    try:
        parts = [int(part) if part.strip() else None for part in text.split(":")]
    except ValueError:
        return None
    if len(parts) == 1:
        return parts[0]
    return slice(*parts) if len(parts) <= 3 and parts[2:] != [0] else None


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def insert_non_local(
    module: nn.Module, positions: Iterable[str], make_block: BlockFactory
) -> list[str]:
    """Put blocks into any CNN, in place, after named children that run in sequence.

    Args:
        module: the network, for instance a torchvision ResNet.
        positions: ``"layer3.4"`` names one child of an ``nn.Sequential``; ``"layer3[-2]"`` and
            ``"layer3[1::2]"`` count its children.
        make_block: from a number of channels to a block, for instance ``NonLocalBlock``; a
            position's own settings come as further keyword arguments.

    Returns:
        The names of the new blocks, such as ``"layer3.nl4"``. No existing name changes.

    Raises:
        PositionError: if a place does not exist, is not in an ``nn.Sequential``, or is named twice.
    """
    points = []
    for position in map(parse_position, positions):
        path, names = _locate(module, position)
        points += [
            InsertionPoint(module.get_submodule(path), path, name, position) for name in names
        ]
    return insert_blocks(points, make_block)


def _locate(module: nn.Module, position: Position) -> tuple[str, list[str]]:
    """The path of a Sequential below ``module`` and the names of its children selected."""
    parts = position.target.split(".")
    sequences = {n: m for n, m in module.named_modules() if isinstance(m, nn.Sequential)}
    parent = sequences.get(".".join(parts[:-1]))
    if position.index is None and parent is not None and parts[-1] in parent._modules:
        return ".".join(parts[:-1]), [parts[-1]]
    if position.target not in sequences:
        raise PositionError(
            f"Position {position.text!r}: {type(module).__name__} runs nothing of that name in a "
            f"sequence. Its sequences are {', '.join(sequences) or 'none'}."
        )
    names = list(sequences[position.target]._modules)
    inserted = set(map(block_name, names))
    counted = [name for name in names if name not in inserted]
    return position.target, position.select(counted, "blocks")


def block_name(child: str) -> str:
    """What the block after a child is called."""
    return f"nl{child}" if child.isdigit() else f"nl_{child}"


@dataclass(frozen=True)
class InsertionPoint:
    """The place of one block: after the child ``name`` of ``sequence``, called ``path``."""

    sequence: nn.Sequential
    path: str
    name: str
    position: Position

    @property
    def layers(self) -> list[nn.Module]:
        """The children of the sequence up to and with the one that the block follows."""
        names = list(self.sequence._modules)
        return list(self.sequence)[: names.index(self.name) + 1]


# So what is random in a block shifts nothing else: for the same seed, a detector starts with the
# same weights with and without blocks.
@torch.random.fork_rng(devices=())
def insert_blocks(points: Sequence[InsertionPoint], make_block: BlockFactory) -> list[str]:
    """Put a block at each insertion point; the names of the blocks.

    Raises:
        PositionError: If two positions name one insertion point, or a position's settings make no
            block; the module is then left as it was.
    """
    blocks: dict[str, nn.Module] = {}
    for point in points:
        new = block_name(point.name)
        name = f"{point.path}.{new}".lstrip(".")
        if name in blocks or new in point.sequence._modules:
            raise PositionError(
                f"Position {point.position.text!r} puts a second block after {point.name} of "
                f"{point.path or 'the module'}; each place takes one."
            )
        channels = output_channels(point.layers)
        block = build_block_at(point.position, channels, make_block)
        like = [parameter for layer in point.layers for parameter in layer.parameters()]
        blocks[name] = block.to(like[-1]).train(point.layers[-1].training)
    for point, block in zip(points, blocks.values()):
        _insert_after(point.sequence, point.name, block)
    return list(blocks)


def build_block_at(position: Position, channels: int, make_block: BlockFactory) -> nn.Module:
    """A block with the position's own settings.

    Raises:
        PositionError: with what is wrong with them.
    """
    try:
        return make_block(channels, **position.settings)
    except (ValueError, TypeError) as error:
        raise PositionError(f"Position {position.text!r}: {error}") from error


def _insert_after(sequence: nn.Sequential, name: str, block: nn.Module) -> None:
    """Add all children again in their order, the block among them.

    So their names, the sequence itself and every other reference to it stay what they were:
    detectron2's ResNet keeps a second one in ``stages``.
    """
    children = list(sequence._modules.items())
    sequence._modules.clear()
    for child_name, child in children:
        sequence.add_module(child_name, child)
        if child_name == name:
            sequence.add_module(block_name(name), block)


def output_channels(layers: Sequence[nn.Module]) -> int:
    """The channels that the last of ``layers`` gives, by its own word or its last inner layer's.

    A layer that does not tell, such as a ReLU, gives what it gets.
    """
    for layer in reversed(layers):
        for part in (layer, *reversed(list(layer.modules()))):
            for attribute in ("out_channels", "out_features"):
                channels = getattr(part, attribute, None)
                if isinstance(channels, int):
                    return channels
    names = ", ".join(type(layer).__name__ for layer in layers)
    raise PositionError(f"It cannot be told how many channels come out of {names}.")
