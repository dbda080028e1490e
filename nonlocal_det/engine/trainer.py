"""detectron2's trainer, with our optimisers, checkpoints and pictures of attention."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from ..attention.hook import AttentionHook
from ..layers.base import choose
from ..modeling.checkpoint import NonLocalCheckpointer
from .pictures import NamingMapper


class Trainer(DefaultTrainer):
    """detectron2's trainer, evaluating by each dataset's ``evaluator_type``."""

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        """The evaluator of a COCO, semantic or panoptic dataset.

        Raises:
            ValueError: for a dataset of another kind.
        """
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        evaluators: list[DatasetEvaluator] = []
        if kind in ("sem_seg", "coco_panoptic_seg"):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if kind in ("coco", "coco_panoptic_seg"):
            sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
            evaluators.append(COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas))
        if kind == "coco_panoptic_seg":
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        if not evaluators:
            raise ValueError(
                f"Dataset {dataset_name!r} has evaluator_type {kind!r}; 'coco', 'sem_seg' and "
                f"'coco_panoptic_seg' can be evaluated."
            )
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """detectron2's, which names a picture that cannot be read."""
        return build_detection_train_loader(cfg, mapper=NamingMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Likewise."""
        mapper = NamingMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """SGD as detectron2 makes it, or AdamW with the same groups of parameters.

        Raises:
            ValueError: if ``SOLVER.OPTIMIZER`` is neither.
        """
        choose("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, ("SGD", "AdamW"))
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        groups = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(groups, lr=cfg.SOLVER.BASE_LR)

    def build_hooks(self) -> list[Any]:
        """Make detectron2's hooks, saving and loading with our checkpointer."""
        # Before the hooks are made: the one that saves holds on to the checkpointer.
        self.checkpointer = NonLocalCheckpointer(
            self.checkpointer.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )
        built = super().build_hooks()
        if self.cfg.MODEL.NONLOCAL.VIS_PERIOD:
            # Before the writers, which come last.
            built.insert(-1, AttentionHook(self.cfg, self.cfg.MODEL.NONLOCAL.VIS_PERIOD))
        return built

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: torch.nn.Module) -> OrderedDict[str, Any]:
        """Evaluate with test-time augmentation; the results' names end in ``_TTA``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((name + "_TTA", value) for name, value in results.items())
