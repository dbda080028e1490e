"""The evaluator of a dataset, by its ``evaluator_type``: as in detectron2's own training script."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..modeling.predictions import OUTPUTS
from .coco_evaluation import ReportingCOCOEvaluator

# What an evaluator of each type evaluates: outputs of a model.
_EVALUATED = {
    "coco": "instances",
    "coco_panoptic_seg": "panoptic_seg",
    "sem_seg": "sem_seg",
    "pascal_voc": "instances",
    "lvis": "instances",
    "cityscapes_instance": "instances",
    "cityscapes_sem_seg": "sem_seg",
}
# Package that detectron2's evaluator imports, and its name on PyPI.
_PACKAGES = {
    "coco_panoptic_seg": ("panopticapi", "git+https://github.com/cocodataset/panopticapi"),
    "lvis": ("lvis", "lvis"),
    "cityscapes_instance": ("cityscapesscripts", "cityscapesScripts"),
    "cityscapes_sem_seg": ("cityscapesscripts", "cityscapesScripts"),
}


def check_evaluator(dataset_name: str, architecture: str) -> None:
    """Check that the outputs of a model can be evaluated on a dataset.

    Args:
        dataset_name: Name of a registered dataset.
        architecture: ``MODEL.META_ARCHITECTURE`` of the model.

    Raises:
        ValueError: If they cannot; the message lists what can, or names the package to install.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _EVALUATED:
        raise ValueError(
            f"Dataset {dataset_name!r} of DATASETS.TEST has evaluator_type {kind!r}, which cannot "
            f"be evaluated; {', '.join(_EVALUATED)} can."
        )
    needed = _EVALUATED[kind]
    outputs = OUTPUTS.get(architecture, (needed,))
    if needed not in outputs:
        raise ValueError(
            f"Dataset {dataset_name!r} of DATASETS.TEST is evaluated by {needed}, but a "
            f"{architecture} predicts {' and '.join(outputs)} only."
        )
    package, source = _PACKAGES.get(kind, ("", ""))
    if package and find_spec(package) is None:
        raise ValueError(
            f"Dataset {dataset_name!r} of DATASETS.TEST is evaluated with {package}, which is not "
            f"installed: pip install {source}"
        )


def build_evaluator(
    dataset_name: str, folder: str, kpt_oks_sigmas: Sequence[float] = ()
) -> DatasetEvaluator:
    """Build the evaluator of a dataset.

    Args:
        dataset_name: Name of a registered dataset, whose ``evaluator_type`` is supported.
        folder: Output directory.
        kpt_oks_sigmas: OKS sigmas of the keypoints; COCO's by default.

    Raises:
        ValueError: If the ``evaluator_type`` is not supported.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "sem_seg":
        return SemSegEvaluator(dataset_name, output_dir=folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=folder)
    if kind == "cityscapes_instance":
        return CityscapesInstanceEvaluator(dataset_name)
    if kind == "cityscapes_sem_seg":
        return CityscapesSemSegEvaluator(dataset_name)
    if kind not in ("coco", "coco_panoptic_seg"):
        raise ValueError(f"Dataset {dataset_name!r} has evaluator_type {kind!r}.")
    coco = ReportingCOCOEvaluator(
        dataset_name, output_dir=folder, kpt_oks_sigmas=list(kpt_oks_sigmas)
    )
    if kind == "coco":
        return coco
    return DatasetEvaluators(
        [
            SemSegEvaluator(dataset_name, output_dir=folder),
            coco,
            COCOPanopticEvaluator(dataset_name, folder),
        ]
    )
