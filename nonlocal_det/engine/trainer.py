"""detectron2's trainer, with our optimisers and pictures of attention, safe to stop and resume."""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict
from typing import Any, Optional

import detectron2.utils.comm as comm
import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils.logger import setup_logger

from ..attention.hook import AttentionHook
from ..checkpoint.atomic_checkpoint import AtomicCheckpointer
from ..data.dataset_mapper import CheckedDatasetMapper
from ..data.train_loader import build_resumable_train_loader
from ..evaluation import ReportingCOCOEvaluator
from ..modeling.supported_positions import used_features
from ..utils.validation import check_choice
from .hooks import ResumeHook, TrainingErrorHook
from .launch import SkipEvalOnErrorMixin, wrap_ddp
from .train_loop import GradAccumTrainer, resolve_amp_dtype

# The hooks that act after the one that saves checkpoints.
_AFTER_CHECKPOINTS = (hooks.EvalHook, hooks.PeriodicWriter, AttentionHook)


class Trainer(SkipEvalOnErrorMixin, DefaultTrainer):
    """detectron2's trainer, evaluating by each dataset's ``evaluator_type``."""

    def __init__(self, cfg: CfgNode) -> None:
        """Put together what DefaultTrainer does, of our parts."""
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # as DefaultTrainer, where no script has done it
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        model = wrap_ddp(
            model, broadcast_buffers=False, find_unused_parameters=_has_unused_features(cfg, model)
        )
        self._trainer = self.build_inner_trainer(cfg, model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_inner_trainer(
        cls, cfg: CfgNode, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer
    ) -> GradAccumTrainer:
        """What ``SOLVER.ACCUMULATION_STEPS`` and ``SOLVER.AMP`` say of one step.

        Raises:
            ValueError: for a dtype that the device cannot train in.
        """
        amp, precision = cfg.SOLVER.AMP, None
        if amp.ENABLED:
            precision = resolve_amp_dtype("SOLVER.AMP.DTYPE", amp.DTYPE, cfg.MODEL.DEVICE)
        passes = cfg.SOLVER.ACCUMULATION_STEPS
        return GradAccumTrainer(
            model, loader, optimizer, accumulation_steps=passes, precision=precision
        )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Batches in an order that ``SEED`` decides, which a resumed run goes on with."""
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        return build_resumable_train_loader(cfg, mapper=mapper, seed=_seed(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """detectron2's, which names a picture that cannot be read."""
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    def build_hooks(self) -> list[Any]:
        """Make detectron2's hooks, and ours."""
        built = super().build_hooks()
        if self.cfg.MODEL.NONLOCAL.VIS_PERIOD:
            # Before the writers, which come last.
            built.insert(-1, AttentionHook(self.cfg, self.cfg.MODEL.NONLOCAL.VIS_PERIOD))
        later = [hook for hook in built if isinstance(hook, _AFTER_CHECKPOINTS)]
        self._guard = TrainingErrorHook()
        self._resume = ResumeHook(
            self._trainer.data_loader, _seed(self.cfg), self.cfg.OUTPUT_DIR, later
        )
        return [*built, self._guard, self._resume]

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last whole checkpoint, or else ``MODEL.WEIGHTS``."""
        super().resume_or_load(resume)
        self._resume.resumes = resume

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, with the step's, which detectron2 0.5 leaves out."""
        return {**TrainerBase.state_dict(self), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of any version's checkpoint."""
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logging.getLogger("detectron2").warning(
                "The checkpoint lacks the optimiser's state: its momentum starts anew."
            )

    def train(self) -> Any:
        """Train, and evaluate as configured.

        Raises:
            TrainingError: if memory or the disk is full, a picture cannot be used, or losses are
                not finite.
        """
        with self._guard.explains(self.checkpointer):
            return super().train()

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
            evaluators.append(
                ReportingCOCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas)
            )
        if kind == "coco_panoptic_seg":
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        if not evaluators:
            raise ValueError(
                f"Dataset {dataset_name!r} has evaluator_type {kind!r}; 'coco', 'sem_seg' and "
                f"'coco_panoptic_seg' can be evaluated."
            )
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD as detectron2 makes it, or AdamW with the same groups of parameters.

        Raises:
            ValueError: if ``SOLVER.OPTIMIZER`` is neither.
        """
        check_choice("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, ("SGD", "AdamW"))
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

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict[str, Any]:
        """Evaluate with test-time augmentation; the results' names end in ``_TTA``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((name + "_TTA", value) for name, value in results.items())


def _seed(cfg: CfgNode) -> int:
    """The one that `setup` has chosen; where it did not, one that cannot be known again."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def _has_unused_features(cfg: CfgNode, model: nn.Module) -> bool:
    """Whether nothing reads some output of the backbone, so that its parameters get no gradient.

    The exchange of gradients would wait for them in vain, unless it looks for them, which costs.
    """
    read = used_features(cfg)
    return read is not None and not read.issuperset(model.backbone.output_shape())
