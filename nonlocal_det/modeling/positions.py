"""The syntax of positions, such as ``"res4[-2]"``, and the insertion of blocks after them.

A position is a target (a stage, an output, a head or a module), an index or slice in Python's own
syntax if the target has several children, and optionally settings that apply to its blocks alone:
``"res3[1::2] PAIRWISE=dot_product"``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional, Union

import torch
import torch.nn as nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

BlockFactory = Callable[..., nn.Module]

_SYNTAX = re.compile(r"(?P<target>[\w.\-]+)(\[(?P<index>[-+:\d\s]*)\])?(?P<settings>(\s+\w+=\S+)*)")
_PROBE = (64, 96, 80)  # spatial size of features that layers are tried on
_EXAMPLES = "'res4[-2]', 'res3[1::2]', 'p3', 'mask_head[-1]', 'res3[:] PAIRWISE=dot_product'"


class PositionError(ValueError):
    """Error for a position that cannot be read, does not exist, or whose output is not used."""


@dataclass(frozen=True)
class Position:
    """One entry of ``MODEL.NONLOCAL.POSITIONS``.

    Attributes:
        text: The entry as it was written.
        target: The part of the model that it refers to: a stage, an output, a head or a module.
        index: Index or slice of the target's children, or None.
        settings: Block settings that apply at this position alone.
    """

    text: str
    target: str
    index: Union[int, slice, None] = None
    settings: dict[str, Any] = field(default_factory=dict)

    def select(self, names: Sequence[str], kind: str) -> list[str]:
        """Select children of the target by the index.

        Args:
            names: Names of the children that count.
            kind: Plural noun for these children, for messages.

        Raises:
            PositionError: If there is no index, or it selects nothing.
        """
        if self.index is None:
            raise PositionError(
                f"Position {self.text!r}: {self.target} has {len(names)} {kind}; say after which, "
                f"as in '{self.target}[-1]' or '{self.target}[:]'."
            )
        try:
            selected = names[self.index]
        except IndexError:
            selected = []
        if not selected:
            span = f"from 0 to {len(names) - 1}, or -1 to -{len(names)} from the end"
            there = f"indices go {span}" if names else "there is nothing to insert a block after"
            raise PositionError(
                f"Position {self.text!r} selects nothing: {self.target} has {len(names)} {kind}; "
                f"{there}."
            )
        return [selected] if isinstance(selected, str) else list(selected)


def parse_position(text: str) -> Position:
    """Parse one position.

    Raises:
        PositionError: If it does not follow the syntax; the message gives examples that do.
    """
    match = _SYNTAX.fullmatch(text.strip()) if isinstance(text, str) else None
    index = None
    if match and match["index"] is not None:
        index = _parse_index(match["index"])
    if match is None or (match["index"] is not None and index is None):
        raise PositionError(
            f"{text!r} is not a position. Write a stage, output, head or module and, if it has "
            f"several children, an index or slice: {_EXAMPLES}."
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
    """Insert blocks into any CNN, in place, after children of its ``nn.Sequential`` modules.

    Args:
        module: The network, for instance a torchvision ResNet.
        positions: Positions of the blocks. ``"layer3.4"`` names one child of an ``nn.Sequential``;
            ``"layer3[-2]"`` and ``"layer3[1::2]"`` index its children.
        make_block: Factory from a number of channels to a block, for instance ``NonLocalBlock``. It
            gets a position's own settings as keyword arguments.

    Returns:
        The names of the new blocks, such as ``"layer3.nl4"``. Existing names do not change.

    Raises:
        PositionError: If a position does not exist, is not in an ``nn.Sequential``, or is given
            twice.
    """
    points = []
    for position in map(parse_position, positions):
        path, names = _locate(module, position)
        points += [
            InsertionPoint(module.get_submodule(path), path, name, position) for name in names
        ]
    return insert_blocks(points, make_block)


def _locate(module: nn.Module, position: Position) -> tuple[str, list[str]]:
    """Find the path of a position's ``nn.Sequential`` and the names of the selected children."""
    parts = position.target.split(".")
    sequences = {n: m for n, m in module.named_modules() if _is_sequential(m)}
    parent = sequences.get(".".join(parts[:-1]))
    if position.index is None and parent is not None and parts[-1] in parent._modules:
        return ".".join(parts[:-1]), [parts[-1]]
    if position.target not in sequences:
        raise PositionError(
            f"Position {position.text!r}: {type(module).__name__} has no nn.Sequential "
            f"{position.target!r} that runs its children one after the other; it has "
            f"{', '.join(sequences) or 'none'}."
        )
    names = list(sequences[position.target]._modules)
    inserted = set(map(block_name, names))
    counted = [name for name in names if name not in inserted]
    return position.target, position.select(counted, "blocks")


def _is_sequential(module: nn.Module) -> bool:
    """Whether children run one after the other; a subclass may do anything else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def block_name(child: str) -> str:
    """Name of the block after a child."""
    return f"nl{child}" if child.isdigit() else f"nl_{child}"


@dataclass(frozen=True)
class InsertionPoint:
    """Insertion point of one block.

    Attributes:
        sequence: The ``nn.Sequential`` that gets the block.
        path: Dotted name of that sequence in the network.
        name: Name of the child that the block follows.
        position: The position that selected the child.
    """

    sequence: nn.Sequential
    path: str
    name: str
    position: Position

    @property
    def layers(self) -> list[nn.Module]:
        """The children of the sequence up to and including the one that the block follows."""
        names = list(self.sequence._modules)
        return list(self.sequence)[: names.index(self.name) + 1]


# Initializing blocks does not advance the global random generator: for the same seed, a detector
# has the same initial weights with and without blocks.
@torch.random.fork_rng(devices=())
def insert_blocks(points: Sequence[InsertionPoint], make_block: BlockFactory) -> list[str]:
    """Insert a block at each insertion point.

    Args:
        points: Insertion points, in the order in which blocks are built.
        make_block: Factory of blocks; see `insert_non_local`.

    Returns:
        The names of the blocks, in the order of the points.

    Raises:
        PositionError: If two positions select the same insertion point, or a position's settings
            are wrong; the network is then unchanged.
    """
    blocks: dict[str, nn.Module] = {}
    for point in points:
        new = block_name(point.name)
        name = f"{point.path}.{new}".lstrip(".")
        if name in blocks or new in point.sequence._modules:
            raise PositionError(
                f"Position {point.position.text!r} puts a second block after {point.name} of "
                f"{point.path or 'the module'}; each insertion point takes one."
            )
        channels = output_channels(point.layers)
        block = build_block_at(point.position, channels, make_block)
        like = [parameter for layer in point.layers for parameter in layer.parameters()]
        blocks[name] = block.to(like[-1]).train(point.layers[-1].training)
    for point, block in zip(points, blocks.values()):
        _insert_after(point.sequence, point.name, block)
    return list(blocks)


def build_block_at(position: Position, channels: int, make_block: BlockFactory) -> nn.Module:
    """Build a block with the position's own settings.

    Args:
        position: Position whose settings apply.
        channels: Number of channels at the insertion point.
        make_block: Factory of blocks; see `insert_non_local`.

    Raises:
        PositionError: If a setting is wrong; the message says which and why.
    """
    try:
        return make_block(channels, **position.settings)
    except (ValueError, TypeError) as error:
        raise PositionError(f"Position {position.text!r}: {error}") from error


def _insert_after(sequence: nn.Sequential, name: str, block: nn.Module) -> None:
    """Insert a block after a child, by adding all children again in order.

    Their names and the sequence object itself stay, so other references to it, such as ``stages``
    of detectron2's ResNet, remain valid.
    """
    children = list(sequence._modules.items())
    sequence._modules.clear()
    for child_name, child in children:
        sequence.add_module(child_name, child)
        if child_name == name:
            sequence.add_module(block_name(name), block)


def output_channels(layers: Sequence[nn.Module]) -> int:
    """Number of output channels of layers that run in sequence.

    It is measured, on the meta device, where the layers take features (B, C, *S). Otherwise it is
    the ``out_channels`` or ``out_features`` of the last layer, or inside it, that has one.

    Raises:
        PositionError: If no layer has either.
    """
    measured = _measured_channels(layers)
    if measured is not None:
        return measured
    for layer in reversed(layers):
        for part in (layer, *reversed(list(layer.modules()))):
            for attribute in ("out_channels", "out_features"):
                channels = getattr(part, attribute, None)
                if isinstance(channels, int):
                    return channels
    names = ", ".join(type(layer).__name__ for layer in layers)
    raise PositionError(f"Cannot infer the output channels of {names}.")


@torch.no_grad()
def _measured_channels(layers: Sequence[nn.Module]) -> Optional[int]:
    """Channels of what the layers make of features as wide as their first convolution takes."""
    convs = (part for layer in layers for part in layer.modules() if isinstance(part, _ConvNd))
    first = next(convs, None)
    if first is None:
        return None
    shape = (2, first.in_channels, *_PROBE[: first.weight.dim() - 2])
    y = torch.empty(shape, dtype=first.weight.dtype, device="meta")
    try:
        for layer in layers:
            tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
            on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
            y = functional_call(layer, on_meta, (y,))
        return y.shape[1] if y.dim() == len(shape) else None
    except Exception:  # a layer wants something else, or an operator knows no meta device
        return None
