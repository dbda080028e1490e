"""Files that are whole at any moment, whatever ends the program, and folders to write them to."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

TMP_SUFFIX = ".tmp"  # ends the name of a file that is being written
_TMP_PATTERN = re.compile(r"[0-9a-f]{16}-.+\.tmp")


def ensure_writable_dir(path: str, option: str = "--output") -> None:
    """Make a folder and see that it can be written to; an address elsewhere is left to the run.

    Raises:
        OSError: if it cannot.
    """
    if "://" in path:
        return
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        said = "it is a file" if os.path.isfile(path) else error.strerror
        raise OSError(
            f"{option} is {path!r}, where nothing can be written ({said}); give another folder."
        ) from error


@contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file that appears under its name whole, or not at all.

    It is written beside that name, brought to the disk, and renamed. What was there before stays
    until then, and for ever if the writing fails.

    Args:
        path: of a local file.
        mode: "w", for text in UTF-8, or "wb".

    Raises:
        OSError: if the disk is full, or the folder cannot be written.
    """
    folder, name = os.path.split(path)
    # Processes of several machines may write the same file on a disk that they share.
    beside = os.path.join(folder, f"{secrets.token_hex(8)}-{name}{TMP_SUFFIX}")
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
    _sync_folder(folder or ".")


def remove_stale_temp_files(folder: str) -> None:
    """Remove what killed programs were writing into a folder, which may not exist."""
    if os.path.isdir(folder):
        for name in filter(_TMP_PATTERN.fullmatch, os.listdir(folder)):
            os.remove(os.path.join(folder, name))


def _sync_folder(folder: str) -> None:
    """Bring the new name to the disk as well, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
