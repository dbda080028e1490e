"""COCO's evaluation in C++, for where detectron2's own compiled one is missing.

It is faster-coco-eval's, <https://github.com/MiXaiLL76/faster_coco_eval>, which is optional. Its
numbers are pycocotools', which tests/test_evaluation.py sees to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.evaluation import coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None
else:

    class FastCOCOeval(COCOeval_faster):
        """pycocotools' ``COCOeval``, on its own ``COCO`` objects."""

        def __init__(self, ground_truth: COCO, detections: COCO, iou_type: str) -> None:
            super().__init__(iouType=iou_type, print_function=print)
            self.cocoGt, self.cocoDt = ground_truth, detections
            # All classes: of keypoints it would leave out those that have no object.
            self.params.imgIds = sorted(ground_truth.getImgIds())
            self.params.catIds = sorted(ground_truth.getCatIds())


def can_use_faster_coco_eval() -> bool:
    """Whether the fast evaluation is installed, and detectron2 lacks its own."""
    own = getattr(coco_evaluation, "COCOeval_opt", COCOeval)
    return COCOeval_faster is not None and own is COCOeval


@contextmanager
def patch_cocoeval() -> Iterator[None]:
    """While this lasts, detectron2's COCO evaluation is the fast one.

    detectron2 knows its class by a global name alone, so the name stands for another one until
    the evaluation ends.
    """
    coco_evaluation.COCOeval = FastCOCOeval
    try:
        yield
    finally:
        coco_evaluation.COCOeval = COCOeval
