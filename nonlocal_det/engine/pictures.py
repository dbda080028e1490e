"""Reading pictures during a run: whatever is wrong with one, the error names it."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper

from ..modeling.checks import said_by
from .failure import RunFailure, memory_is_full


class PictureError(RunFailure):
    """A picture, or what is annotated on it, cannot be used; the message is one sentence."""

    def __init__(self, text: str) -> None:
        # From a loading process it comes with the traceback there, which ends with the sentence.
        super().__init__(text.strip().splitlines()[-1].rpartition("PictureError: ")[2])


class NamingMapper(DatasetMapper):
    """detectron2's reader of pictures and annotations."""

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """Read a picture and its annotations, and augment both.

        Raises:
            PictureError: if that fails, with the name of the file.
        """
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            if memory_is_full(error):  # which is not the picture's fault
                raise
            raise PictureError(
                f"{dataset_dict['file_name']!r} or what is annotated on it cannot be used: "
                f"{said_by(error)}. tools/train_net.py --check says what else."
            ) from error
