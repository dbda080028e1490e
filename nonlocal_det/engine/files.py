"""Files that are whole at any moment, whatever ends the program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

BESIDE = ".tmp"  # ends the name of a file that is being written


@contextmanager
def whole_file(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file that appears under its name whole, or not at all.

    It is written beside that name, brought to the disk, and renamed. What was there before stays
    until then, and for ever if the writing fails.

    Args:
        path: of a local file.
        mode: "w", for text in UTF-8, or "wb".

    Raises:
        OSError: if the disk is full, or the folder cannot be written.
    """
    beside = path + BESIDE
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.remove(beside)
        raise
    _sync_folder(os.path.dirname(path) or ".")


def _sync_folder(folder: str) -> None:
    """Bring the new name to the disk as well, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
