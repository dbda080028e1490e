"""Trainer for detectron2's LazyConfigs."""

from __future__ import annotations

import os
import weakref
from typing import Any

import detectron2.utils.comm as comm
import torch.nn as nn
from detectron2.config import instantiate
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from omegaconf import DictConfig

from ..checkpoint.atomic_checkpoint import AtomicCheckpointer
from ..data.dataset_mapper import CheckedDatasetMapper
from ..data.train_loader import build_resumable_train_loader
from ..evaluation import ReportingCOCOEvaluator
from .health import HealthHook
from .hooks import ResumeHook, TrainingErrorHook
from .launch import wrap_ddp
from .train_loop import GradAccumTrainer, resolve_amp_dtype

# The arguments of detectron2's loader that the resumable one has too.
_TRAIN_LOADER_OPTIONS = {
    *("_target_", "dataset", "mapper", "sampler"),
    *("total_batch_size", "aspect_ratio_grouping", "num_workers"),
}


class LazyTrainer(GradAccumTrainer):
    """Trains and evaluates a LazyConfig, as detectron2's ``lazyconfig_train_net.py`` does.

    Args:
        cfg: Config with ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader`` and ``train``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        train = cfg.train
        model = self.build_model(cfg)
        cfg.optimizer.params.model = model
        super().__init__(
            model,
            self.build_train_loader(cfg),
            instantiate(cfg.optimizer),
            accumulation_steps=train.accumulation_steps,
            precision=resolve_amp_dtype(
                train.amp.enabled, train.amp.dtype, "train.amp.dtype", train.device
            ),
        )
        self.cfg = cfg
        self.checkpointer = AtomicCheckpointer(model, train.output_dir, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        """Build the model on its device, wrapped in DDP if there are several processes."""
        return wrap_ddp(instantiate(cfg.model).to(cfg.train.device), **cfg.train.ddp)

    @classmethod
    def build_train_loader(cls, cfg: DictConfig) -> Any:
        """Build the training loader; in place of detectron2's own, a resumable one."""
        loader = cfg.dataloader.train
        if (
            loader._target_ is build_detection_train_loader
            and loader.keys() <= _TRAIN_LOADER_OPTIONS
        ):
            loader._target_ = build_resumable_train_loader
            loader.seed = cfg.train.seed
        return instantiate(_use_checked_mapper(loader))

    @classmethod
    def build_evaluator(cls, cfg: DictConfig) -> Any:
        """Build the evaluator; in place of detectron2's COCO evaluator, the reporting one."""
        evaluator = cfg.dataloader.evaluator
        if evaluator._target_ is COCOEvaluator:
            evaluator._target_ = ReportingCOCOEvaluator
            folder = evaluator.get("output_dir")
            evaluator.output_dir = folder or os.path.join(cfg.train.output_dir, "inference")
        return instantiate(evaluator)

    @classmethod
    def test(cls, cfg: DictConfig, model: nn.Module) -> Any:
        """Evaluate a model on the test set; return the results."""
        evaluator = cls.build_evaluator(cfg)
        loader = instantiate(_use_checked_mapper(cfg.dataloader.test))
        results = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results)
        return results

    def build_hooks(self) -> list[Any]:
        """Build the hooks of detectron2's script, health of the blocks, errors and resuming."""
        train, is_main = self.cfg.train, comm.is_main_process()
        before = [
            HealthHook(train.checkpointer.period),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(self.cfg.lr_multiplier)),
        ]
        after_checkpoint = [
            hooks.EvalHook(train.eval_period, lambda: self.test(self.cfg, self.model))
        ]
        if is_main:
            before.append(hooks.PeriodicCheckpointer(self.checkpointer, **train.checkpointer))
            writers = default_writers(train.output_dir, train.max_iter)
            after_checkpoint.append(hooks.PeriodicWriter(writers, period=train.log_period))
        self._error_hook = TrainingErrorHook()
        self._resume_hook = ResumeHook(
            self.data_loader, train.seed, train.output_dir, after_checkpoint
        )
        return [*before, *after_checkpoint, self._error_hook, self._resume_hook]

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last valid checkpoint or, without one, ``train.init_checkpoint``."""
        self.checkpointer.resume_or_load(self.cfg.train.init_checkpoint, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
        self._resume_hook.is_resumed = resume

    def train(self) -> None:
        """Train, and evaluate as configured.

        Raises:
            TrainingError: If training stops for a known reason; see `TrainingErrorHook`.
        """
        with self._error_hook.report_errors(self.checkpointer):
            super().train(self.start_iter, self.cfg.train.max_iter)


def _use_checked_mapper(loader: DictConfig) -> DictConfig:
    """Let a loader with detectron2's own mapper name an image that cannot be loaded."""
    mapper = loader.get("mapper")
    if mapper is not None and mapper._target_ is DatasetMapper:
        mapper._target_ = CheckedDatasetMapper
    return loader
