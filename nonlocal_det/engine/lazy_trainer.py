"""What `setup` and `Trainer` do, for detectron2's LazyConfigs."""

from __future__ import annotations

import os
import weakref
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, Optional, Union

import detectron2.utils.comm as comm
import torch
import torch.nn as nn
from detectron2.config import instantiate
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from omegaconf import DictConfig

from ..checkpoint.atomic_checkpoint import AtomicCheckpointer
from ..config import load_lazy_config
from ..data.dataset_mapper import CheckedDatasetMapper
from ..data.train_loader import build_resumable_train_loader
from ..evaluation import ReportingCOCOEvaluator
from ..utils.file_io import ensure_writable_dir
from .defaults import CheckedCfg, begin
from .hooks import ResumeHook, TrainingErrorHook
from .launch import resolve_device, world_size_of, wrap_ddp
from .preflight import check_batch_size, check_dataset_registered, check_device
from .run_info import choose_seed
from .train_loop import GradAccumTrainer, resolve_amp_dtype

# What our training stream takes as detectron2's loader does.
_TRAIN_LOADER_OPTIONS = {
    *("_target_", "dataset", "mapper", "sampler"),
    *("total_batch_size", "aspect_ratio_grouping", "num_workers"),
}


def setup(args: Namespace) -> DictConfig:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        OSError, ValueError: as `load_and_check_cfg`.
        ValueError: for a record of earlier starts that cannot be read.
    """
    cfg, device, _ = load_and_check_cfg(args)
    asked, cfg.train.device = cfg.train.device, device
    folder = cfg.train.output_dir
    cfg.train.seed = choose_seed(cfg.train.seed, folder, args)
    begin(cfg, args, folder, cfg.train.seed, moved=asked != device)
    return cfg


def load_and_check_cfg(args: Namespace) -> CheckedCfg:
    """All that can be known to be wrong before anything is written.

    Raises:
        OSError: for a configuration or a dataset that is missing, or an output folder that cannot
            be written to.
        ValueError: for an override that cannot be read, a dataset name that does not exist, a
            batch that cannot be divided, or processes that cannot be started.
    """
    cfg = load_lazy_config(args.config_file, args.opts)
    data = cfg.dataloader
    for loader in (data.test,) if args.eval_only else (data.train, data.test):
        for name in _names(loader.dataset.names):
            check_dataset_registered(name)
    device = resolve_device(cfg.train.device, "train.device=cpu", args)
    check_device(device, "train.device")
    _precision(cfg, device)
    if not args.eval_only:
        pictures = {"dataloader.train.total_batch_size": data.train.total_batch_size}
        passes = {"train.accumulation_steps": cfg.train.accumulation_steps}
        check_batch_size(pictures, passes, world_size_of(args))
    ensure_writable_dir(cfg.train.output_dir, "train.output_dir")
    return CheckedCfg(cfg, device)


def _names(names: Union[str, Iterable[str]]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _precision(cfg: DictConfig, device: str) -> Optional[torch.dtype]:
    """As ``SOLVER.AMP``."""
    amp = cfg.train.amp
    if not amp.enabled:
        return None
    return resolve_amp_dtype("train.amp.dtype", amp.dtype, device)


def _use_checked_mapper(loader: DictConfig) -> DictConfig:
    """Have detectron2's own reader of pictures name one that cannot be read."""
    mapper = loader.get("mapper")
    if mapper is not None and mapper._target_ is DatasetMapper:
        mapper._target_ = CheckedDatasetMapper
    return loader


class LazyTrainer(GradAccumTrainer):
    """Trains and evaluates a LazyConfig, as detectron2's own script for them does."""

    def __init__(self, cfg: DictConfig) -> None:
        model = self.build_model(cfg)
        cfg.optimizer.params.model = model
        super().__init__(
            model,
            self.build_train_loader(cfg),
            instantiate(cfg.optimizer),
            accumulation_steps=cfg.train.accumulation_steps,
            precision=_precision(cfg, cfg.train.device),
        )
        self.cfg = cfg
        self.checkpointer = AtomicCheckpointer(
            model, cfg.train.output_dir, trainer=weakref.proxy(self)
        )
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        """The model, on its device, and for all processes where there are several."""
        return wrap_ddp(instantiate(cfg.model).to(cfg.train.device), **cfg.train.ddp)

    @classmethod
    def build_train_loader(cls, cfg: DictConfig) -> Any:
        """As configured; detectron2's own in an order that a resumed run goes on with."""
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
        """As configured; detectron2's own for COCO with our files, in the output folder."""
        evaluator = cfg.dataloader.evaluator
        if evaluator._target_ is COCOEvaluator:
            evaluator._target_ = ReportingCOCOEvaluator
            folder = evaluator.get("output_dir")
            evaluator.output_dir = folder or os.path.join(cfg.train.output_dir, "inference")
        return instantiate(evaluator)

    @classmethod
    def test(cls, cfg: DictConfig, model: nn.Module) -> Any:
        """Evaluate on the test set; the results."""
        evaluator = cls.build_evaluator(cfg)
        loader = instantiate(_use_checked_mapper(cfg.dataloader.test))
        results = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results)
        return results

    def build_hooks(self) -> list[Any]:
        """The hooks of detectron2's script, and ours."""
        settings, main = self.cfg.train, comm.is_main_process()
        before = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(self.cfg.lr_multiplier)),
        ]
        later = [hooks.EvalHook(settings.eval_period, lambda: self.test(self.cfg, self.model))]
        if main:
            before.append(hooks.PeriodicCheckpointer(self.checkpointer, **settings.checkpointer))
            writers = default_writers(settings.output_dir, settings.max_iter)
            later.append(hooks.PeriodicWriter(writers, period=settings.log_period))
        self._guard = TrainingErrorHook()
        self._resume = ResumeHook(self.data_loader, settings.seed, settings.output_dir, later)
        return [*before, *later, self._guard, self._resume]

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last whole checkpoint, or else ``train.init_checkpoint``."""
        self.checkpointer.resume_or_load(self.cfg.train.init_checkpoint, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
        self._resume.resumes = resume

    def train(self) -> None:
        """Train, and evaluate as configured.

        Raises:
            TrainingError: if memory or the disk is full, or losses are not finite.
        """
        with self._guard.explains(self.checkpointer):
            super().train(self.start_iter, self.cfg.train.max_iter)
