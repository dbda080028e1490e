"""COCO evaluation in C++, for installations without detectron2's own compiled one.

The implementation is faster-coco-eval, <https://github.com/MiXaiLL76/faster_coco_eval>, which is
optional. Its metrics are those of pycocotools, which is tested in tests/test_evaluation.py.
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
        """Drop-in replacement of pycocotools' ``COCOeval`` for pycocotools' ``COCO`` objects."""

        def __init__(self, ground_truth: COCO, detections: COCO, iou_type: str) -> None:
            super().__init__(iouType=iou_type, print_function=print)
            self.cocoGt, self.cocoDt = ground_truth, detections
            # All classes: for keypoints it would omit classes without objects.
            self.params.imgIds = sorted(ground_truth.getImgIds())
            self.params.catIds = sorted(ground_truth.getCatIds())


def can_use_faster_coco_eval() -> bool:
    """Whether faster-coco-eval is installed, and detectron2 lacks its own compiled evaluation."""
    own = getattr(coco_evaluation, "COCOeval_opt", COCOeval)
    return COCOeval_faster is not None and own is COCOeval


def are_ids_exact(truth: COCO) -> bool:
    """Whether faster-coco-eval, which holds ids as doubles, can tell all ids of a dataset apart."""
    return all(abs(one) < 2**53 for one in (*truth.imgs, *truth.cats))


@contextmanager
def patch_cocoeval() -> Iterator[None]:
    """Let detectron2's COCO evaluation use faster-coco-eval within the body.

    detectron2 refers to COCOeval by a module global, which is patched during the evaluation.
    """
    coco_evaluation.COCOeval = FastCOCOeval
    try:
        yield
    finally:
        coco_evaluation.COCOeval = COCOeval
