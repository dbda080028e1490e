"""detectron2's predictor, with weights from files that cannot run code."""

from __future__ import annotations

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
