"""The command line: one module per command, each with a parser and a short main.

    nonlocal-det COMMAND ...        or        python -m nonlocal_det COMMAND ...

The scripts in ``tools/`` are the same commands, for use from a checkout.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Optional

import detectron2
import torch

from .. import __version__
from ..errors import PROGRAM, program

# What each command does. Its module has the same name, with "_" for "-", and is imported only when
# the command runs.
COMMANDS = {
    "train": "train or evaluate a detector from a YAML config",
    "lazy-train": "train or evaluate a detector from a LazyConfig",
    "check-data": "validate a COCO dataset before training",
    "demo": "train two small detectors, without and with a block, and compare what they see",
    "visualize": "draw detections and the attention behind each of them",
    "measure-attention": "compute attention statistics of each block over a dataset",
    "analyze": "count the parameters and FLOPs that the blocks add",
    "benchmark": "measure time and peak memory of the operators, blocks or a whole detector",
    "ablate": "train variants with several seeds and test their differences",
    "ablate-small": "train a small network to see which settings of a block learn",
    "export": "export a detector to TorchScript or ONNX and verify the file",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command that the arguments name.

    Args:
        argv: Arguments after the program's name; by default those of the process.

    Returns:
        The exit code of the command; 2 for a command that does not exist.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(version())
        return 0
    if name not in COMMANDS:
        print(f"{PROGRAM}: error: {unknown_command(name)}", file=sys.stderr)
        return 2
    return import_module(f".{name.replace('-', '_')}", __name__).main(rest) or 0


def usage() -> str:
    """The text of ``--help``: one line per command."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"usage: {PROGRAM} [-h] [--version] COMMAND ...",
            "",
            "Non-local blocks in detectron2 detectors.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items()),
            "",
            f"`{PROGRAM} COMMAND --help` shows the options of a command. Wherever a config file is "
            "asked for,\nthe name of a config of the model zoo will do, such as mask_rcnn_R50_NL.",
        ]
    )


def version() -> str:
    """The text of ``--version``: those of the package and of what it runs on."""
    libraries = f"detectron2 {detectron2.__version__}, torch {torch.__version__}"
    return f"{PROGRAM} {__version__} ({libraries})"


def unknown_command(name: str) -> str:
    """One sentence on a command that does not exist, with the nearest that do."""
    near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}."
    return f"there is no command {name!r}; {hint}"


def program_name(command: str) -> str:
    """Name of a command for its own usage message, as it was started."""
    script = program()
    return script if script.endswith(".py") else f"{PROGRAM} {command}"
