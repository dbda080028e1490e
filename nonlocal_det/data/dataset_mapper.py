"""A dataset mapper whose errors name the image."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper

from ..errors import DataLoadingError, is_out_of_memory, summarize_error


class CheckedDatasetMapper(DatasetMapper):
    """detectron2's `DatasetMapper`, which names the file if an image cannot be loaded."""

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """Load an image and its annotations, and augment both.

        Raises:
            DataLoadingError: If that fails; the message names the file.
        """
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            if is_out_of_memory(error):  # not the fault of the image
                raise
            raise DataLoadingError(
                f"Failed to load image {dataset_dict['file_name']!r} or its annotations: "
                f"{summarize_error(error)}. To find all such problems, run `nonlocal-det train` "
                f"(tools/train_net.py) with --check-data."
            ) from error
