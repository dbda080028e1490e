"""Reading pictures during a run: whatever is wrong with one, the error names it."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper

from ..errors import DataLoadingError, is_out_of_memory, summarize_error


class CheckedDatasetMapper(DatasetMapper):
    """detectron2's reader of pictures and annotations."""

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """Read a picture and its annotations, and augment both.

        Raises:
            DataLoadingError: if that fails, with the name of the file.
        """
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            if is_out_of_memory(error):  # which is not the picture's fault
                raise
            raise DataLoadingError(
                f"{dataset_dict['file_name']!r} or what is annotated on it cannot be used: "
                f"{summarize_error(error)}. tools/train_net.py --check says what else."
            ) from error
