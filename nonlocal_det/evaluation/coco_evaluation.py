"""detectron2's COCO evaluation, with the results of each class in files."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Optional

from detectron2.evaluation import COCOEvaluator
from pycocotools.cocoeval import COCOeval

from ..utils.plotting import save_figure
from .coco_eval_backend import can_use_faster_coco_eval, patch_cocoeval
from .per_class import per_class_results, write_per_class_csv
from .precision_recall import precision_recall_figure


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
        self._is_fast = use_fast_impl and can_use_faster_coco_eval()

    def _eval_predictions(self, *predictions: Any, **options: Any) -> None:
        """As detectron2, with the fast evaluation where that is to be used."""
        if not self._is_fast:
            return super()._eval_predictions(*predictions, **options)
        self._logger.info("COCO's measures are computed by faster-coco-eval.")
        with patch_cocoeval():
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
    rows = per_class_results(evaluation)
    write_per_class_csv(rows, table_file)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    figure = precision_recall_figure([row.name for row in rows], precision, evaluation.params)
    save_figure(figure, figure_file)
