"""detectron2's COCO evaluation, with the results of each class in files."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Optional

from detectron2.evaluation import COCOEvaluator
from pycocotools.cocoeval import COCOeval

from ..attention import save_figure
from .curves import precision_recall_figure
from .fast import fast_evaluation, is_needed
from .table import class_table, write_table


class ReportingCOCOEvaluator(COCOEvaluator):
    """detectron2's evaluator, quick where it is slow, that leaves a table and curves as well.

    Arguments, results and files are detectron2's. For each task, "bbox", "segm" or "keypoints",
    these are added to ``output_dir``:

    - ``<dataset>_<task>_per_class.csv``: each class's objects, AP, AP50, AP75 and AR;
    - ``<dataset>_<task>_precision_recall.png``.

    ``use_fast_impl=False`` asks for pycocotools itself.
    """

    def __init__(
        self, dataset_name: str, *options: Any, use_fast_impl: bool = True, **more_options: Any
    ) -> None:
        super().__init__(dataset_name, *options, use_fast_impl=use_fast_impl, **more_options)
        self._is_fast = use_fast_impl and is_needed()

    def _eval_predictions(self, *predictions: Any, **options: Any) -> None:
        """As detectron2, with the fast evaluation where that is to be used."""
        if not self._is_fast:
            return super()._eval_predictions(*predictions, **options)
        self._logger.info("COCO's measures are computed by faster-coco-eval.")
        with fast_evaluation():
            super()._eval_predictions(*predictions, **options)

    def _derive_coco_results(
        self, coco_eval: Optional[COCOeval], iou_type: str, class_names: Optional[list[str]] = None
    ) -> dict[str, float]:
        """As detectron2; and write the files."""
        results = super()._derive_coco_results(coco_eval, iou_type, class_names=class_names)
        if self._output_dir:
            start = os.path.join(self._output_dir, f"{self._metadata.name}_{iou_type}")
            _write(coco_eval, f"{start}_per_class.csv", f"{start}_precision_recall.png")
        return results


def _write(evaluation: Optional[COCOeval], table_file: str, figure_file: str) -> None:
    """Write table and curves; without an evaluation, as nothing was found, remove earlier ones."""
    if evaluation is None:
        for path in (table_file, figure_file):
            with suppress(FileNotFoundError):
                os.remove(path)
        return
    rows = class_table(evaluation)
    write_table(rows, table_file)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    figure = precision_recall_figure([row.name for row in rows], precision, evaluation.params)
    save_figure(figure, figure_file)
