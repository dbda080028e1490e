"""How far a detector can see: the farthest pixel that can have a part in how a box is named."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes
from torch import nn


@torch.no_grad()
def receptive_field_radius(
    model: nn.Module, box_size: float, width: int, height: int = 64
) -> float:
    """The receptive field of a box's pooled features, from the box's centre sideways, in pixels.

    A picture's first column is nan, and what that column has a part in becomes nan too: exactly,
    whatever the weights are.

    Args:
        model: a detectron2 model with ``StandardROIHeads``; its weights stay as they are.
        box_size: height and width of the box in pixels.
        width: of the picture in pixels; more than the reach.
        height: likewise.

    Returns:
        The distance, to within a pixel; at most that of the last box inside the picture.
    """
    picture = torch.ones(1, 3, height, width, dtype=torch.float64)  # zeros would be padding
    picture[..., 0] = torch.nan
    training, dtype = model.training, next(model.parameters()).dtype
    model.double().eval()
    features = model.backbone(picture.to(model.device))
    # Boxes wholly inside the picture, a pixel further to the right each.
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
    seen = centers[pooled.flatten(1).isnan().any(dim=1).cpu()]
    return float(seen.max()) if len(seen) else 0.0
