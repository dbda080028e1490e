"""Scores of given boxes by a detector with RoI heads: its classes, boxes and masks there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn as nn
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What a detector says of boxes. Shape symbol: N boxes.

    Attributes:
        logits: Logit of the given class, shape (N,).
        probabilities: Its probability, among all classes and the background, shape (N,).
        boxes: Box predicted from each box, in pixels of the resized image, shape (N, 4).
        masks: Probabilities of the mask of the given class, shape (N, h, w); None without masks.
    """

    logits: Tensor
    probabilities: Tensor
    boxes: Tensor
    masks: Optional[Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        values = (self.logits, self.probabilities, self.boxes, self.masks)
        return [value for value in values if value is not None]


class FixedBoxes:
    """The part of a detector that does not depend on proposals, for one image.

    Args:
        model: A detectron2 detector with RoI heads.
        inputs: Its inputs, list of dicts.
        image_index: Index of the image in the batch.

    Attributes:
        batch: The image as the backbone gets it, normalized, and padded as in its batch; (1, C, H,
            W).

    Raises:
        TypeError: If its RoI heads are none of detectron2's.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[dict[str, Any]], image_index: int
    ) -> None:
        heads = getattr(model, "roi_heads", None)
        known = isinstance(heads, (StandardROIHeads, Res5ROIHeads))
        if not known or isinstance(heads, CascadeROIHeads):
            raise TypeError(
                f"{type(model).__name__} has the RoI heads {type(heads).__name__}; influence is "
                f"for StandardROIHeads and Res5ROIHeads."
            )
        self._model = model
        self._heads = heads
        images = model.preprocess_image(list(inputs))
        self.batch = images.tensor[image_index : image_index + 1]
        self._size = images.image_sizes[image_index]

    def scorer(self, boxes: Boxes, classes: Tensor) -> Callable[[], Scores]:
        """A function that runs the model on the image and scores boxes.

        Args:
            boxes: Boxes in pixels of the resized image, N of them.
            classes: Class of each, shape (N,).
        """
        instances = Instances(self._size, pred_boxes=boxes, pred_classes=classes)
        of_image = [boxes]

        def score() -> Scores:
            features = self._model.backbone(self.batch)
            if isinstance(self._heads, Res5ROIHeads):
                predictions, masks = self._of_res5(features, of_image, instances)
            else:
                predictions, masks = self._of_heads(features, of_image, instances)
            return self._scores(predictions, boxes, classes, masks)

        return score

    def pooled_size(self, block: nn.Module) -> Optional[tuple[int, int]]:
        """(width, height) of the RoIs of a block in a head; None if it is in the backbone."""
        if block not in set(self._heads.modules()):
            return None
        if isinstance(self._heads, Res5ROIHeads):
            pooler = self._heads.pooler
        elif block in set(self._heads.box_head.modules()):
            pooler = self._heads.box_pooler
        else:
            pooler = self._heads.mask_pooler
        return tuple(pooler.output_size[::-1])

    def _of_heads(
        self, features: dict[str, Tensor], boxes: list[Boxes], instances: Instances
    ) -> tuple[Any, Optional[Tensor]]:
        """Predictions of the box head, and masks, of StandardROIHeads."""
        heads = self._heads
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
        predictions = heads.box_predictor(heads.box_head(pooled))
        if not heads.mask_on:
            return predictions, None
        (found,) = heads.forward_with_given_boxes(features, [_copy(instances)])
        return predictions, found.pred_masks

    def _of_res5(
        self, features: dict[str, Tensor], boxes: list[Boxes], instances: Instances
    ) -> tuple[Any, Optional[Tensor]]:
        """The same of Res5ROIHeads, whose heads share their features."""
        heads = self._heads
        shared = heads._shared_roi_transform([features[f] for f in heads.in_features], boxes)
        predictions = heads.box_predictor(shared.mean(dim=[2, 3]))
        if not heads.mask_on:
            return predictions, None
        (found,) = heads.mask_head(shared, [_copy(instances)])
        return predictions, found.pred_masks

    def _scores(
        self,
        predictions: tuple[Tensor, Tensor],
        boxes: Boxes,
        classes: Tensor,
        masks: Optional[Tensor],
    ) -> Scores:
        logits, deltas = predictions
        rows = torch.arange(len(boxes), device=logits.device)
        moved = self._heads.box_predictor.box2box_transform.apply_deltas(deltas, boxes.tensor)
        moved = moved.reshape(len(boxes), deltas.shape[1] // 4, 4)
        of_class = moved[:, 0] if moved.shape[1] == 1 else moved[rows, classes]
        return Scores(
            logits[rows, classes],
            logits.softmax(dim=1)[rows, classes],
            of_class,
            None if masks is None else masks[:, 0],
        )


def _copy(instances: Instances) -> Instances:
    """Instances with the same fields, the same objects, to which a head can add its own."""
    return Instances(instances.image_size, **instances.get_fields())
