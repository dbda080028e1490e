"""Errors that end a program with a one-line message instead of a traceback."""

from __future__ import annotations

import logging
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile

import detectron2

# Messages of CUDA, torch on CPUs, OpenCV, the C++ library, and torch about a worker that the system
# killed, or that found no shared memory; any other signal has another cause.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|allocate memory|not enough memory|insufficient memory|bad_alloc"
    r"|worker .*killed by signal: (Killed|Bus error)",
    re.IGNORECASE,
)


PROGRAM = "nonlocal-det"


def program() -> str:
    """Name of the running program, for its messages: a script's, or that of the command line."""
    script = os.path.basename(sys.argv[0])
    return PROGRAM if script == "__main__.py" else script


@contextmanager
def exit_on_error(*kinds: type[Exception]) -> Iterator[None]:
    """Exit with a one-line error message and exit code 1 if the body raises an expected error.

    An error that the user's own code raised, such as a registered dataset's function or a custom
    module, keeps its traceback.

    Args:
        kinds: Exceptions whose message says all that the user needs; by default ValueError and
            OSError.
    """
    expected = kinds or (ValueError, OSError)
    try:
        yield
    except expected as error:
        if in_user_code(error):
            raise
        sys.exit(f"{program()}: error: {error}")


@contextmanager
def errors_logged(what: str) -> Iterator[None]:
    """Log an error of the body, whatever it is, as a warning."""
    try:
        yield
    except Exception as error:
        logging.getLogger("detectron2").warning(f"{what}: {summarize_error(error)}.")


_LIBRARIES = (
    os.path.dirname(os.path.abspath(__file__)),
    os.path.dirname(detectron2.__file__),
    sysconfig.get_path("stdlib"),
    "<",  # no file: frozen or generated code
)
_LIBRARY_FOLDER = re.compile(r"[/\\](site|dist)-packages[/\\]")


def in_user_code(error: BaseException) -> bool:
    """Whether an error comes from a function of the user's that this package or a library called.

    The user's code that called them first, such as a script, does not count.
    """
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][1:]
    called = dropwhile(lambda file: not _is_library(file), files)
    return not all(map(_is_library, called))


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or bool(_LIBRARY_FOLDER.search(file))


class TrainingError(RuntimeError):
    """Training or evaluation stopped for a known reason, which the message explains."""


class DataLoadingError(TrainingError):
    """An image or its annotations cannot be loaded; the message names the file in one line."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker passes it on with the worker's traceback, whose last line it is.
        super().__init__(message.strip().splitlines()[-1].rpartition("DataLoadingError: ")[2])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that GPU or host memory is exhausted."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def summarize_error(error: Exception) -> str:
    """Return an error's class name and the first sentence of its message."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    first = text.strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
