"""Drawing detections on images: their masks, boxes, keypoints and labels.

Images are RGB uint8 arrays of shape (H, W, 3); every function returns a new array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import to_rgb

from .labels import Place, with_free_label
from .overlay import ACCENT, check_image, draw_box, line_width

# The colors of Okabe and Ito, distinguishable with any kind of color vision.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")


def overlay_instances(
    image: np.ndarray,
    instances: Instances,
    labels: Sequence[str],
    *,
    metadata: Optional[Metadata] = None,
    colors: Optional[Sequence[Any]] = None,
) -> np.ndarray:
    """Draw detections on an image of any size: boxes, masks and keypoints, if present.

    A label that has no free place is reduced to its first word, or else left out: labels do not
    overlap.

    Args:
        image: RGB uint8 image (H, W, 3), to which the instances are scaled.
        instances: Predictions for an image of size ``instances.image_size``, (height, width).
        labels: Label of each instance.
        metadata: Metadata of the dataset, which holds the names of keypoints.
        colors: Matplotlib color of each instance. Default: the colors of `PALETTE` in turn.

    Returns:
        RGB uint8 image (H, W, 3).
    """
    check_image(image)
    factor = np.array(image.shape[1::-1]) / instances.image_size[::-1]
    boxes = instances.pred_boxes.tensor.cpu().numpy() * np.tile(factor, 2)
    if colors is None:
        colors = [PALETTE[i % len(PALETTE)] for i in range(len(boxes))]
    inks = [tuple(round(c * 255) for c in to_rgb(color)) for color in colors]
    result = image.copy()
    if instances.has("pred_masks"):
        for mask, ink in zip(instances.pred_masks.cpu().numpy(), inks):
            result = draw_mask(result, mask, color=ink)
    for box, ink in zip(boxes, inks):
        result = draw_box(result, box, color=ink)
    if instances.has("pred_keypoints"):
        drawn = Visualizer(result, metadata)
        for points in instances.pred_keypoints.cpu().numpy() * [*factor, 1.0]:
            drawn.draw_and_connect_keypoints(points)
        result = drawn.output.get_image()
    taken: list[Place] = []
    for box, label, ink in zip(boxes, labels, inks):
        result = with_free_label(result, box, label, ink, taken)
    return result


def draw_mask(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    color: tuple[int, int, int] = ACCENT,
    opacity: float = 0.5,
) -> np.ndarray:
    """Fill a mask and draw its outline, smooth at the resolution of the image.

    Args:
        image: RGB uint8 image (H, W, 3), to which the mask is scaled.
        mask: Boolean mask of any size.
        color: RGB color.
        opacity: Opacity of the area, from 0 to 1; the outline is opaque.

    Returns:
        RGB uint8 image (H, W, 3).
    """
    check_image(image)
    soft = _resized_mask(mask, image.shape[1::-1])
    # Distance from the edge, in pixels of the image, where it is small: soft is a blurred step.
    inside = np.clip((soft - 0.5) * 4 + 0.5, 0, 1)
    width = line_width(image)
    signed = cv2.distanceTransform((soft > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    signed -= cv2.distanceTransform((soft <= 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    line = np.clip(width / 2 + 0.5 - np.abs(signed - np.sign(signed) * 0.5), 0, 1)
    alpha = np.maximum(opacity * inside, line)[..., None]
    return (image * (1 - alpha) + np.array(color) * alpha + 0.5).astype(np.uint8)


def _resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a boolean mask (H, W) to (width, height), as floats from 0 to 1; its edge is at 0.5.

    Enlarged ones get smooth edges, not stairs.
    """
    resized = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    blur = 0.7 * size[0] / mask.shape[1]
    if blur > 1:
        # A border of the same values: masks that reach the border of the image still do.
        resized = cv2.GaussianBlur(resized, (0, 0), blur, borderType=cv2.BORDER_REPLICATE)
    return resized
