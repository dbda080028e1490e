"""detectron2's predictor, with weights from files that cannot run code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from .detection_checkpoint import NonLocalCheckpointer


class Predictor(DefaultPredictor):
    """detectron2's ``DefaultPredictor``, whose weights `NonLocalCheckpointer` loads.

    Args:
        cfg: Config of the model, with ``MODEL.WEIGHTS``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        without_weights = cfg.clone()
        without_weights.defrost()
        without_weights.MODEL.WEIGHTS = ""
        super().__init__(without_weights)
        self.cfg = cfg.clone()
        NonLocalCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)

    def model_inputs(self, image: np.ndarray) -> list[dict[str, Any]]:
        """The inputs with which a call of the predictor calls the model.

        Args:
            image: Image in the format of `INPUT.FORMAT`, uint8 (H, W, 3), which is BGR by default.
        """
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return [{"image": pixels, "height": height, "width": width}]
