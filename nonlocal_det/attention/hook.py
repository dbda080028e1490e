"""A training hook that writes attention maps and statistics to TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import read_image
from detectron2.engine import HookBase
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..errors import errors_logged
from ..layers.base import NonLocalBase
from ..utils.deprecation import renamed_arguments
from .figures.attention_figure import attention_panel
from .recording.query import AttentionQuery
from .recording.recorder import AttentionRecorder
from .recording.statistics import attention_stats

_TAGS = ("entropy", "att_distance", "residual_ratio")


class AttentionHook(HookBase):
    """Writes attention to TensorBoard every ``period`` iterations and after the last one.

    - Scalars of each block, averaged over the images: ``entropy``, ``att_distance`` and
      ``residual_ratio``, which `nonlocal_det.attention.recording.statistics` defines, and
      ``output_weight_rms``. A block whose residual ratio and output weights stay near zero is dead;
      one with an entropy near one, or an attention distance near zero, attends to nothing in
      particular.
    - For each image and each block outside of the heads, the attention map of the center of the
      largest annotated object, the same point every time.

    Training is not affected, to the bit, and not ended by an error here, which is logged. Cost per
    write: one inference call for each image and 64 rows of each block's attention matrix, on the
    main process only.

    Args:
        cfg: detectron2 config of the model; images are the first ones of ``DATASETS.TEST``. If that
            is empty, nothing is written.
        period: Number of iterations between two writes.
        num_images: Maximum number of images.
    """

    @renamed_arguments(pictures="num_images")
    def __init__(self, cfg: CfgNode, period: int, num_images: int = 3) -> None:
        self._cfg = cfg
        self._period = period
        self._num_images = num_images
        self._samples: list[tuple[dict[str, Any], np.ndarray, AttentionQuery]] = []

    def before_train(self) -> None:
        """Read the images."""
        if not comm.is_main_process():
            return
        # Resizing samples from the only size there is; the trainer's random numbers must not shift.
        state = np.random.get_state()
        with errors_logged("The images whose attention is to be monitored cannot be read"):
            self._read_samples()
        np.random.set_state(state)

    def _read_samples(self) -> None:
        if not self._cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty")
        mapper = DatasetMapper(self._cfg, is_train=False)
        for dataset_dict in DatasetCatalog.get(self._cfg.DATASETS.TEST[0])[: self._num_images]:
            image = read_image(dataset_dict["file_name"], "RGB")
            query = _largest_object_query(dataset_dict, image)
            self._samples.append((mapper(dataset_dict), image, query))

    def after_step(self) -> None:
        """Write, if it is time."""
        iteration = self.trainer.iter + 1
        if self._samples and (iteration % self._period == 0 or iteration == self.trainer.max_iter):
            # Not DistributedDataParallel: inference on one process must not wait for the others.
            model = getattr(self.trainer.model, "module", self.trainer.model)
            training = model.training
            with errors_logged(f"The attention of iteration {iteration} cannot be monitored"):
                self._write(model.eval())
            model.train(training)

    def _write(self, model: nn.Module) -> None:
        recorder, storage = AttentionRecorder(model), self.trainer.storage
        scalars: dict[str, list[float]] = {}
        for index, (model_input, image, query) in enumerate(self._samples):
            with torch.no_grad(), recorder:
                model([model_input])
            _write_panels(storage, recorder, image, query, index)
            for tag, value in _statistics(recorder):
                scalars.setdefault(tag, []).append(value)
        for block in recorder.block_names:
            scalars[f"{block}/output_weight_rms"] = [output_weight_rms(model.get_submodule(block))]
        for tag, values in scalars.items():
            storage.put_scalar(f"attention/{tag}", np.mean(values).item(), smoothing_hint=False)


def _write_panels(
    storage: EventStorage,
    recorder: AttentionRecorder,
    image: np.ndarray,
    query: AttentionQuery,
    index: int,
) -> None:
    """Write the attention map of each recorded block outside of the heads."""
    for block in recorder.recorded_blocks:
        if recorder.roi_boxes(block) is None:
            attn_map = recorder.attention_maps(block, [query.point])[0]
            top_keys = recorder.top_k(block, query.point)
            panel = attention_panel(image, attn_map, query, top_keys)
            storage.put_image(f"attention/{block}/{index}", panel.transpose(2, 0, 1))


def _statistics(recorder: AttentionRecorder) -> Iterator[tuple[str, float]]:
    """The tag, without its prefix, and the value of each statistic of the recorded blocks."""
    for block in recorder.recorded_blocks:
        stats = attention_stats(recorder, block)
        if stats is not None:
            for name in _TAGS:
                yield f"{block}/{name}", getattr(stats, name)


def _largest_object_query(dataset_dict: dict[str, Any], image: np.ndarray) -> AttentionQuery:
    """The center of the largest annotated object in the image, or else of the image."""
    height, width = image.shape[:2]
    size = np.array([width, height, width, height])
    boxes = [
        np.clip(BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), 0, size).tolist()
        for a in dataset_dict.get("annotations", ())
    ]
    x0, y0, x1, y1 = max(boxes, key=_area, default=(0, 0, 0, 0))
    if not _area((x0, y0, x1, y1)) > 0:
        return AttentionQuery((width / 2, height / 2))
    return AttentionQuery(((x0 + x1) / 2, (y0 + y1) / 2), box=(x0, y0, x1, y1))


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def output_weight_rms(block: NonLocalBase) -> float:
    """Compute the root mean square of the weights of a block's output projection.

    It is multiplied by that of the scale (gamma) of the norm that follows, if any, and is 0 for a
    freshly initialized block.
    """
    gamma = getattr(block.norm, "weight", None)
    return _rms(block.out.weight) * (1.0 if gamma is None else _rms(gamma))


def _rms(weight: Tensor) -> float:
    return weight.detach().float().square().mean().sqrt().item()
