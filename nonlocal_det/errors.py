"""Errors that end a run with a message instead of a traceback."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# As CUDA, torch on CPUs, OpenCV, the C++ library, and torch of a loading process say it.
_MEMORY_FULL = re.compile(
    r"out of memory|allocate memory|not enough memory|insufficient memory|bad_alloc"
    r"|worker .*killed by signal",
    re.IGNORECASE,
)


@contextmanager
def exit_on_error(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with what a wrong input raised, as one sentence, and exit code 1.

    Args:
        kinds: of errors that speak for themselves; by default ValueError and OSError.
    """
    expected = kinds or (ValueError, OSError)
    try:
        yield
    except expected as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")


class TrainingError(RuntimeError):
    """A run stopped for a reason that the message, one sentence or more, explains."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, of the GPU or of the machine."""
    return isinstance(error, MemoryError) or bool(_MEMORY_FULL.search(str(error)))


class DataLoadingError(TrainingError):
    """A picture, or what is annotated on it, cannot be used; the message is one sentence."""

    def __init__(self, text: str) -> None:
        # From a loading process it comes with the traceback there, which ends with the sentence.
        super().__init__(text.strip().splitlines()[-1].rpartition("DataLoadingError: ")[2])


def summarize_error(error: Exception) -> str:
    """An error's kind and its first sentence."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    first = text.strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
