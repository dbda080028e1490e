"""What detectron2's architectures predict: kinds of outputs, classes and keypoints."""

from __future__ import annotations

from detectron2.config import CfgNode

# Outputs by MODEL.META_ARCHITECTURE; of others they are unknown.
OUTPUTS = {
    "GeneralizedRCNN": ("instances",),
    "RetinaNet": ("instances",),
    "SemanticSegmentor": ("sem_seg",),
    "PanopticFPN": ("instances", "sem_seg", "panoptic_seg"),
}
# Config nodes with a NUM_CLASSES, and the metadata key of the names of these classes.
_CLASS_NODES = {
    "GeneralizedRCNN": {"ROI_HEADS": "thing_classes"},
    "RetinaNet": {"RETINANET": "thing_classes"},
    "SemanticSegmentor": {"SEM_SEG_HEAD": "stuff_classes"},
    "PanopticFPN": {"ROI_HEADS": "thing_classes", "SEM_SEG_HEAD": "stuff_classes"},
}


def predicted_counts(cfg: CfgNode) -> dict[str, tuple[str, int]]:
    """Numbers of the classes and keypoints that a model predicts.

    Args:
        cfg: Config of the model.

    Returns:
        Config key and number, by the metadata key of the names: ``"thing_classes"``,
        ``"stuff_classes"`` or ``"keypoint_names"``. Nothing for an unknown architecture.
    """
    model = cfg.MODEL
    counts = {
        names: (f"MODEL.{node}.NUM_CLASSES", model[node].NUM_CLASSES)
        for node, names in _CLASS_NODES.get(model.META_ARCHITECTURE, {}).items()
    }
    if model.KEYPOINT_ON:
        head = model.ROI_KEYPOINT_HEAD
        counts["keypoint_names"] = ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", head.NUM_KEYPOINTS)
    return counts
