"""Output files of a command: written completely or not at all, and never over another file.

An output folder gets a hidden folder with a list for each command: the SHA-256 digests of the files
that the command wrote, in the format of ``sha256sum``. A file on the list is the command's own
earlier output, which it may replace. Any other file, one that was changed since among them, is the
user's.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

HIDDEN_FOLDER = ".nonlocal-det"


class CommandOutputs:
    """The output files of one command, in any folder.

    Args:
        command: Name of the command, which names its lists.
    """

    def __init__(self, command: str) -> None:
        self._list = os.path.join(HIDDEN_FOLDER, f"{command}.sha256")

    def is_earlier_output(self, path: str) -> bool:
        """Whether a file is as the command wrote it earlier."""
        folder, name = os.path.split(path)
        return os.path.isfile(path) and _line(path, name) in self._lines(folder)

    def may_write(self, path: str) -> bool:
        """Whether there is no file of that name, or an earlier output."""
        return not os.path.lexists(path) or self.is_earlier_output(path)

    def check(self, *paths: str) -> None:
        """Check that the command may write its files.

        Raises:
            FileExistsError: If one of them is the user's.
        """
        for path in paths:
            if not self.may_write(path):
                raise FileExistsError(
                    f"{path!r} exists and is not an earlier output of this command; move it, or "
                    f"choose another output."
                )

    @contextmanager
    def drafts(self, folder: str) -> Iterator[str]:
        """Give a temporary folder whose files are moved to the output folder at the end.

        Each file appears there under its name completely; none does if the body raises an error.

        Args:
            folder: Output folder; it is created.

        Yields:
            Path of the temporary folder, on the same file system.

        Raises:
            FileExistsError: If a file of the user's has appeared meanwhile; it is kept.
        """
        hidden = os.path.join(folder, HIDDEN_FOLDER)
        os.makedirs(hidden, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=hidden) as temporary:
            yield temporary
            names = sorted(os.listdir(temporary))
            self.check(*(os.path.join(folder, name) for name in names))
            for name in names:
                # Listed first: a run that ends in between leaves no output that is taken for a
                # user's file.
                self._add(folder, _line(os.path.join(temporary, name), name))
                os.replace(os.path.join(temporary, name), os.path.join(folder, name))

    def _lines(self, folder: str) -> set[str]:
        try:
            with open(os.path.join(folder, self._list), encoding="utf-8") as file:
                return set(file.read().splitlines())
        except FileNotFoundError:
            return set()

    def _add(self, folder: str, line: str) -> None:
        # One short write at the end of the file: runs in parallel do not mix their lines.
        if line not in self._lines(folder):
            with open(os.path.join(folder, self._list), "a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def _line(path: str, name: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return f"{digest.hexdigest()}  {name}"
