"""Check that the datasets of a run have the annotations that its model needs."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES


def check_annotations(cfg: CfgNode, *, eval_only: bool) -> None:
    """Check masks and keypoints, as far as the metadata of the datasets say what they have.

    Args:
        cfg: Config of the run.
        eval_only: Whether the run only evaluates.

    Raises:
        ValueError: If masks or the names of keypoints are missing in training, or if the evaluation
            has sigmas for another number of keypoints.
    """
    for name in () if eval_only else cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        if cfg.MODEL.MASK_ON and metadata.get("evaluator_type") == "pascal_voc":
            raise ValueError(
                f"MODEL.MASK_ON is True, but dataset {name!r}, of Pascal VOC, has only boxes: set "
                f"it to False."
            )
        missing = [k for k in ("keypoint_names", "keypoint_flip_map") if metadata.get(k) is None]
        if cfg.MODEL.KEYPOINT_ON and missing:
            raise ValueError(
                f"MODEL.KEYPOINT_ON is True, but the metadata of dataset {name!r} lack "
                f"{' and '.join(missing)}."
            )
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST:
        count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or len(COCO_PERSON_KEYPOINT_NAMES)
        if sigmas != count:
            raise ValueError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values (COCO's, if it is empty), but "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count}; there must be one of each."
            )
