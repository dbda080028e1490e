"""Receptive field of a detector: the farthest pixel that can influence how a box is classified."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import nn


@torch.no_grad()
def receptive_field_radius(
    model: nn.Module, box_size: float, width: int, height: int = 64
) -> float:
    """Horizontal extent of the receptive field of a box's pooled features, from the box's center.

    The first column of an image is nan, and so becomes every feature that depends on it: the result
    is exact for any weights.

    Args:
        model: Detectron2 model with ``StandardROIHeads``; its weights are not changed.
        box_size: Height and width of the box in pixels.
        width: Width of the image in pixels; it must exceed the result.
        height: Height of the image in pixels.

    Returns:
        The distance in pixels, to within one; at most that of the last box inside the image.
    """
    image = torch.ones(1, 3, height, width, dtype=torch.float64)  # zeros would be padding
    image[..., 0] = torch.nan
    training, dtype = model.training, next(model.parameters()).dtype
    model.double().eval()
    features = model.backbone(image.to(model.device))
    # Boxes inside the image, each one pixel to the right of the one before.
    centers = torch.arange(box_size / 2, width - box_size / 2, dtype=torch.float64)
    middle = torch.full_like(centers, height / 2)
    centers_xyxy = torch.stack([centers, middle, centers, middle], dim=1)
    boxes = centers_xyxy + torch.tensor([-1, -1, 1, 1]) * box_size / 2
    heads = model.roi_heads
    pooled = heads.box_pooler(
        [features[name] for name in heads.box_in_features],
        [Boxes(boxes.to(model.device))],
    )
    model.to(dtype).train(training)
    influenced = centers[pooled.flatten(1).isnan().any(dim=1).cpu()]
    return float(influenced.max()) if len(influenced) else 0.0


def cue_reach(cfg: CfgNode, cue_radius: float) -> float:
    """Distance in pixels from which on a cue is outside a model's receptive field.

    It is measured from the center of the largest object, to the center of the cue.

    Args:
        cfg: Config of the model, whose first dataset for testing has images of one size.
        cue_radius: Radius of a cue around its center, pixels.
    """
    dataset = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    size = max(max(a["bbox"][2:]) for image in dataset for a in image["annotations"])
    shape = dataset[0]["width"], dataset[0]["height"]
    return receptive_field_radius(build_model(cfg), size, *shape) + cue_radius
