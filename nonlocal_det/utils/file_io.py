"""Atomic file writing, and output directories."""

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
    """Create a directory and check that files can be written to it.

    Args:
        path: Local directory.
        option: Option or config key that names the directory, for the error message.

    Raises:
        OSError: If the directory cannot be created or written to, or is a URL.
    """
    if "://" in path:
        raise OSError(f"{option} is {path!r}, a URL; it must be a local directory.")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = "it is a file" if os.path.isfile(path) else error.strerror
        raise OSError(
            f"{option} {path!r} is not writable ({reason}); choose another directory."
        ) from error


@contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file that appears under its name completely, or not at all.

    The content goes to a temporary file in the same directory, is synced to disk, and is then
    renamed. An earlier file of that name stays until then, and if writing fails.

    Args:
        path: Path of a local file.
        mode: "w" for text in UTF-8, or "wb".

    Raises:
        OSError: If the disk is full or the directory is not writable.
    """
    folder, name = os.path.split(path)
    # Processes on several machines may write the same file on a shared disk.
    temporary = os.path.join(folder, f"{secrets.token_hex(8)}-{name}{TMP_SUFFIX}")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
    _sync_dir(folder or ".")


def remove_stale_temp_files(folder: str) -> None:
    """Remove the temporary files that killed processes left in a directory, if it exists."""
    if os.path.isdir(folder):
        for name in filter(_TMP_PATTERN.fullmatch, os.listdir(folder)):
            os.remove(os.path.join(folder, name))


def _sync_dir(folder: str) -> None:
    """Sync a renamed file's new name to disk, where the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
