"""``nonlocal-det check-data``: report all issues of datasets, as ``train --check-data``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Optional

from ..engine.dataset_check import run_dataset_check
from ..errors import exit_on_error
from . import train


def parse_args(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Parse the flags of ``train``, with ``--check-data``."""
    return train.parse_args(["--check-data", *(sys.argv[1:] if argv is None else argv)])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the issues of the datasets.

    Args:
        argv: Command line without the program's name; by default that of this process.

    Returns:
        Exit code: 0 if the datasets can be used, 1 if they have errors.
    """
    args = parse_args(argv)
    with exit_on_error():
        return 0 if run_dataset_check(args) else 1
