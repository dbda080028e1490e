"""detectron2's DefaultTrainer, resumable, with more optimizers and attention maps."""

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
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils.logger import setup_logger

from ..attention.hook import AttentionHook
from ..checkpoint.atomic_checkpoint import AtomicCheckpointer
from ..data.dataset_mapper import CheckedDatasetMapper
from ..data.train_loader import build_resumable_train_loader
from ..evaluation.evaluators import build_evaluator
from ..modeling.supported_positions import used_features
from ..utils.validation import check_choice
from .health import HealthHook
from .hooks import ResumeHook, TrainingErrorHook
from .launch import SkipEvalOnErrorMixin, wrap_ddp
from .train_loop import GradAccumTrainer, resolve_amp_dtype
from .trained_classes import CLASSES, TrainedClasses

# The hooks that run after the one that saves checkpoints.
_AFTER_CHECKPOINT = (hooks.EvalHook, hooks.PeriodicWriter, AttentionHook)


class Trainer(SkipEvalOnErrorMixin, DefaultTrainer):
    """Subclass of detectron2's DefaultTrainer that evaluates by a dataset's ``evaluator_type``.

    Args:
        cfg: Config of the run.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # as DefaultTrainer does, if no script has
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        model = wrap_ddp(
            model, broadcast_buffers=False, find_unused_parameters=_has_unused_features(cfg, model)
        )
        self._trainer = self.build_inner_trainer(cfg, model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            trainer=weakref.proxy(self),
            **{CLASSES: TrainedClasses(cfg.DATASETS.TRAIN)},
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_inner_trainer(
        cls, cfg: CfgNode, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer
    ) -> GradAccumTrainer:
        """Build the trainer of one iteration, by ``SOLVER.ACCUMULATION_STEPS`` and ``SOLVER.AMP``.

        Args:
            cfg: Config of the run.
            model: Model on its device, wrapped in DDP if there are several processes.
            loader: Training loader.
            optimizer: Optimizer of the model's parameters.

        Raises:
            ValueError: If the device cannot train in the dtype of ``SOLVER.AMP``.
        """
        amp = cfg.SOLVER.AMP
        return GradAccumTrainer(
            model,
            loader,
            optimizer,
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            precision=resolve_amp_dtype(
                amp.ENABLED, amp.DTYPE, "SOLVER.AMP.DTYPE", cfg.MODEL.DEVICE
            ),
        )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build a resumable loader, whose order and augmentation ``SEED`` determines."""
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        return build_resumable_train_loader(cfg, mapper=mapper, seed=_seed(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build detectron2's loader, with a mapper that names an image that cannot be loaded."""
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    def build_hooks(self) -> list[Any]:
        """Build detectron2's hooks, health of the blocks, attention maps, errors and resuming."""
        built = super().build_hooks()
        if self.cfg.MODEL.NONLOCAL.VIS_PERIOD:
            # Before the writers, which come last.
            built.insert(-1, AttentionHook(self.cfg, self.cfg.MODEL.NONLOCAL.VIS_PERIOD))
        after_checkpoint = [hook for hook in built if isinstance(hook, _AFTER_CHECKPOINT)]
        self._error_hook = TrainingErrorHook()
        self._resume_hook = ResumeHook(
            self._trainer.data_loader, _seed(self.cfg), self.cfg.OUTPUT_DIR, after_checkpoint
        )
        health_hook = HealthHook(self.cfg.SOLVER.CHECKPOINT_PERIOD)
        return [health_hook, *built, self._error_hook, self._resume_hook]

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last valid checkpoint or, without one, ``MODEL.WEIGHTS``."""
        super().resume_or_load(resume)
        self._resume_hook.is_resumed = resume

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from, with the optimizer's, which detectron2 0.5 omits."""
        return {**TrainerBase.state_dict(self), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint of any version of detectron2."""
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logging.getLogger("detectron2").warning(
                "The checkpoint has no optimizer state: momentum restarts from zero."
            )

    def train(self) -> Any:
        """Train, and evaluate as configured.

        Raises:
            TrainingError: If training stops for a known reason; see `TrainingErrorHook`.
        """
        with self._error_hook.report_errors(self.checkpointer):
            return super().train()

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        """Build the evaluator of a dataset; see `evaluation.evaluators`.

        Args:
            cfg: Config of the run.
            dataset_name: Name of a registered dataset.
            output_folder: Output directory; by default ``inference`` in ``OUTPUT_DIR``.

        Raises:
            ValueError: If the dataset's ``evaluator_type`` is not supported.
        """
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(dataset_name, folder, cfg.TEST.KEYPOINT_OKS_SIGMAS)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build detectron2's SGD, or AdamW with the same parameter groups.

        Raises:
            ValueError: If ``SOLVER.OPTIMIZER`` is neither.
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
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(groups, lr=cfg.SOLVER.BASE_LR)

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict[str, Any]:
        """Evaluate with test-time augmentation; names in the results end with ``_TTA``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((name + "_TTA", value) for name, value in results.items())


def _seed(cfg: CfgNode) -> int:
    """Return the seed that `setup` has chosen; without it, one that is not recorded."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def _has_unused_features(cfg: CfgNode, model: nn.Module) -> bool:
    """Whether some backbone outputs are unused, leaving parameters without gradients.

    DDP then needs ``find_unused_parameters=True`` (slower); otherwise it raises or hangs.
    """
    used = used_features(cfg)
    return used is not None and not used.issuperset(model.backbone.output_shape())
