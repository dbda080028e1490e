"""During training: pictures of attention, and numbers that show a dead block early."""

from __future__ import annotations

from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import read_image
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.structures import BoxMode
from torch import Tensor

from ..layers.base import NonLocalBase
from .figure import AttentionQuery, attention_panel
from .recorder import AttentionRecorder
from .statistics import measure


class AttentionHook(HookBase):
    """Writes to TensorBoard, every so many iterations and after the last one.

    For each block, under its name: the ``entropy`` of its maps against uniform, the average
    ``distance`` of the maps of different queries, the ``gain``, norm of what it adds over norm of
    its input, and the ``output_weight``, the root mean square of its output weights (times that of
    gamma, under a norm). A block whose gain and output weight stay near zero is dead; one whose
    entropy is near one, or whose distance is near zero, does not look at anything in particular.

    For each picture and each block of the whole picture, a map: of the centre of the largest
    annotated object, so that the same point is seen at each time.

    Training itself is not affected, to the bit. It costs one inference call with the pictures, and
    64 rows of each block's weights in each, every ``period`` iterations, on the main process only.

    Args:
        cfg: the model's configuration; pictures are the first ones of ``DATASETS.TEST``.
        period: in iterations.
        pictures: how many.
    """

    def __init__(self, cfg: CfgNode, period: int, pictures: int = 3) -> None:
        self._cfg = cfg
        self._period = period
        self._count = pictures
        self._pictures: list[tuple[dict[str, Any], np.ndarray, AttentionQuery]] = []

    def before_train(self) -> None:
        """Read the pictures."""
        if not comm.is_main_process():
            return
        # Resizing draws the one size there is at random: the trainer's own draws must not shift.
        state = np.random.get_state()
        mapper = DatasetMapper(self._cfg, is_train=False)
        for record in DatasetCatalog.get(self._cfg.DATASETS.TEST[0])[: self._count]:
            image = read_image(record["file_name"], "RGB")
            self._pictures.append((mapper(record), image, _look(record, image)))
        np.random.set_state(state)

    def after_step(self) -> None:
        """Write, if it is time."""
        now = self.trainer.iter + 1
        if self._pictures and (now % self._period == 0 or now == self.trainer.max_iter):
            self._write()

    def _write(self) -> None:
        # The model itself: inference in one process must not wait for the others.
        model = getattr(self.trainer.model, "module", self.trainer.model)
        recorder, storage = AttentionRecorder(model), self.trainer.storage
        numbers: dict[str, list[float]] = {}
        for index, (entry, image, look) in enumerate(self._pictures):
            with torch.no_grad(), inference_context(model), recorder:
                model([entry])
            for block in recorder.recorded:
                if recorder.regions(block) is None:
                    heat = recorder.attention_maps(block, [look.point])[0]
                    targets = recorder.strongest(block, look.point)
                    drawn = attention_panel(image, heat, look, targets)
                    storage.put_image(f"attention/{block}/{index}", drawn.transpose(2, 0, 1))
                measured = measure(recorder, block)
                if measured is not None:
                    for name in ("entropy", "gain"):
                        numbers.setdefault(f"{block}/{name}", []).append(getattr(measured, name))
                    numbers.setdefault(f"{block}/distance", []).append(measured.maps)
        for name in recorder.blocks:
            numbers[f"{name}/output_weight"] = [output_weight(model.get_submodule(name))]
        for name, values in numbers.items():
            storage.put_scalar(f"attention/{name}", np.mean(values).item(), smoothing_hint=False)


def _look(record: dict[str, Any], image: np.ndarray) -> AttentionQuery:
    """The centre of the largest object; or of the picture, if it has none."""
    height, width = image.shape[:2]
    boxes = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in record.get("annotations", ())
    ]
    if not boxes:
        return AttentionQuery((width / 2, height / 2))
    x0, y0, x1, y1 = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    return AttentionQuery(((x0 + x1) / 2, (y0 + y1) / 2), box=(x0, y0, x1, y1))


def output_weight(block: NonLocalBase) -> float:
    """The size of the weights that decide what a block adds; 0 for a new one."""
    gamma = getattr(block.norm, "weight", None)
    return _root_mean_square(block.out.weight) * (
        1.0 if gamma is None else _root_mean_square(gamma)
    )


def _root_mean_square(weight: Tensor) -> float:
    return weight.detach().float().square().mean().sqrt().item()
