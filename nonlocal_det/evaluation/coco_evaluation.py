"""detectron2's COCO evaluation, with per-class results and precision-recall curves in files."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout, suppress
from typing import Any, Optional

from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..utils.plotting import save_figure
from .coco_eval_backend import are_ids_exact, can_use_faster_coco_eval, patch_cocoeval
from .per_class import per_class_results, write_per_class_csv
from .precision_recall import precision_recall_figure


class ReportingCOCOEvaluator(COCOEvaluator):
    """detectron2's COCOEvaluator, faster, and with a table and curves per class.

    Arguments, results and files are detectron2's. For each task, "bbox", "segm" or "keypoints",
    two files are added to ``output_dir``:

    - ``<dataset>_<task>_per_class.csv``: number of objects, AP, AP50, AP75 and AR of each class;
    - ``<dataset>_<task>_precision_recall.png``.

    Characters of a dataset's name that file names cannot have are replaced by ``_``. Annotations
    are renumbered in memory, so that any ids give the same metrics. Masks or keypoints are not
    evaluated if the dataset has annotations without.

    Args:
        dataset_name: Name of a registered dataset.
        options: Positional arguments of detectron2's COCOEvaluator.
        use_fast_impl: Whether to use a compiled implementation, if one is installed, instead of
            pycocotools.
        more_options: Keyword arguments of detectron2's COCOEvaluator.
    """

    def __init__(
        self, dataset_name: str, *options: Any, use_fast_impl: bool = True, **more_options: Any
    ) -> None:
        super().__init__(dataset_name, *options, use_fast_impl=use_fast_impl, **more_options)
        _renumber_annotations(self._coco_api)
        self._is_fast = use_fast_impl and can_use_faster_coco_eval()

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> list[str]:
        """Return the tasks of which there are both predictions and annotations."""
        tasks = super()._tasks_from_predictions(predictions)
        for task, key in (("segm", "segmentation"), ("keypoints", "keypoints")):
            lacking = [k for k, one in self._coco_api.anns.items() if not one.get(key)]
            if task in tasks and lacking:
                self._logger.warning(
                    f"{len(lacking)} annotations of dataset {self._metadata.name!r} have no {key}: "
                    f"{task} is not evaluated."
                )
                tasks.remove(task)
        return tasks

    def _eval_predictions(self, *predictions: Any, **options: Any) -> None:
        """Compute the metrics, with faster-coco-eval if it is to be used."""
        if not (self._is_fast and are_ids_exact(self._coco_api)):
            return super()._eval_predictions(*predictions, **options)
        self._logger.info("The COCO metrics are computed by faster-coco-eval.")
        with patch_cocoeval():
            super()._eval_predictions(*predictions, **options)

    def _derive_coco_results(
        self, coco_eval: Optional[COCOeval], iou_type: str, class_names: Optional[list[str]] = None
    ) -> dict[str, float]:
        """Return detectron2's results of a task, and write the files."""
        results = super()._derive_coco_results(coco_eval, iou_type, class_names=class_names)
        if self._output_dir:
            name = re.sub(r'[\\/:*?"<>|]', "_", self._metadata.name)
            prefix = os.path.join(self._output_dir, f"{name}_{iou_type}")
            self._write(coco_eval, f"{prefix}_per_class.csv", f"{prefix}_precision_recall.png")
        return results

    def _write(self, evaluation: Optional[COCOeval], table_file: str, figure_file: str) -> None:
        """Write table and curves; without an evaluation (no detections), remove earlier files."""
        if evaluation is None:
            for path in (table_file, figure_file):
                with suppress(FileNotFoundError):
                    os.remove(path)
            return
        rows = per_class_results(evaluation)
        write_per_class_csv(rows, table_file)
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        try:
            figure = precision_recall_figure(
                [row.name for row in rows], precision, evaluation.params
            )
            save_figure(figure, figure_file)
        except Exception:  # the results of a long run are worth more than a figure
            self._logger.warning(f"{figure_file} could not be drawn.", exc_info=True)


def _renumber_annotations(truth: COCO) -> None:
    """Number the annotations from 1: an id of 0 stands for "not detected" in COCO evaluation."""
    for number, annotation in enumerate(truth.dataset.get("annotations", []), start=1):
        annotation["id"] = number
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
