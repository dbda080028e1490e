#!/usr/bin/env python
r"""Train and evaluate a LazyConfig, with detectron2's standard flags; overrides are KEY=VALUE.

python tools/lazyconfig_train_net.py --num-gpus 8 \
    --config-file configs/lazy/mask_rcnn_R50_NL.py train.output_dir=output/R50
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, Union

import detectron2.utils.comm as comm
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from hydra.errors import HydraException
from omegaconf import DictConfig

from nonlocal_det.engine import (
    FailureGuard,
    ResumeHook,
    TrainingFailure,
    WholeCheckpointer,
    add_to_record,
    build_training_stream,
    check_dataset,
    choose_seed,
    one_sentence_errors,
)

# What our training stream takes as detectron2's loader does.
STREAM_OPTIONS = {
    *("_target_", "dataset", "mapper", "sampler"),
    *("total_batch_size", "aspect_ratio_grouping", "num_workers"),
}


def setup(args: Namespace) -> DictConfig:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        FileNotFoundError: for a missing configuration or dataset.
        ValueError: for an override that cannot be read, or a dataset name that does not exist.
    """
    if not os.path.isfile(args.config_file):
        raise FileNotFoundError(f"There is no configuration file {args.config_file!r}.")
    cfg = LazyConfig.load(args.config_file)
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except (HydraException, KeyError) as error:
        raise ValueError(
            f"The overrides {' '.join(args.opts)!r} cannot be read; each is KEY=VALUE, as in "
            f"train.max_iter=1000. {str(error).splitlines()[0]}"
        ) from error
    data = cfg.dataloader
    for loader in (data.test,) if args.eval_only else (data.train, data.test):
        for name in _names(loader.dataset.names):
            check_dataset(name)
    on_cpu = cfg.train.device == "cuda" and not torch.cuda.is_available()
    if on_cpu:
        cfg.train.device = "cpu"
    output = cfg.train.output_dir
    if not args.eval_only:
        cfg.train.seed = choose_seed(cfg.train.get("seed", -1), output, args.resume)
    default_setup(cfg, args)
    if not args.eval_only:
        add_to_record(output, seed=cfg.train.seed, resume=args.resume)
    if on_cpu:
        logging.getLogger("detectron2").info("No GPU was found: this runs on the CPU.")
    return cfg


def _names(names: Union[str, Iterable[str]]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def build_model(cfg: DictConfig) -> torch.nn.Module:
    """The model, on its device, and for all processes where there are several."""
    with one_sentence_errors():
        model = instantiate(cfg.model).to(cfg.train.device)
    # On CPUs, no device is a process's own.
    own = {"device_ids": None} if cfg.train.device == "cpu" else {}
    return create_ddp_model(model, **cfg.train.ddp, **own)


def build_train_loader(cfg: DictConfig) -> Any:
    """As configured; detectron2's own in an order that a resumed run goes on with."""
    loader = cfg.dataloader.train
    if loader._target_ is build_detection_train_loader and loader.keys() <= STREAM_OPTIONS:
        loader._target_ = build_training_stream
        loader.seed = cfg.train.seed
    return instantiate(loader)


def test(cfg: DictConfig, model: torch.nn.Module) -> Any:
    """Evaluate on the test set; the results."""
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if comm.is_main_process():
        print_csv_format(results)
    return results


def train(cfg: DictConfig, resume: bool) -> None:
    """Train, from ``train.init_checkpoint`` or from where the output folder's run stopped."""
    model = build_model(cfg)
    cfg.optimizer.params.model = model
    trainer_class = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    loader = build_train_loader(cfg)
    trainer = trainer_class(model, loader, instantiate(cfg.optimizer))
    output = cfg.train.output_dir
    checkpointer = WholeCheckpointer(model, output, trainer=trainer)
    later = [
        hooks.EvalHook(cfg.train.eval_period, lambda: test(cfg, model)),
        _on_main(
            lambda: hooks.PeriodicWriter(
                default_writers(output, cfg.train.max_iter), period=cfg.train.log_period
            )
        ),
    ]
    later = [hook for hook in later if hook is not None]
    guard, resuming = FailureGuard(), ResumeHook(loader, cfg.train.seed, output, later)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            _on_main(lambda: hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)),
            *later,
            guard,
            resuming,
        ]
    )
    with one_sentence_errors():
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    goes_on = resume and checkpointer.has_checkpoint()
    resuming.resumes = resume
    with one_sentence_errors(TrainingFailure), guard.explains(checkpointer):
        trainer.train(trainer.iter + 1 if goes_on else 0, cfg.train.max_iter)


def _on_main(make: Any) -> Any:
    """A hook of the main process only; there is none elsewhere."""
    return make() if comm.is_main_process() else None


def main(args: Namespace) -> Any:
    """Train, or with ``--eval-only`` evaluate; ends with one sentence if the input is wrong."""
    with one_sentence_errors():
        cfg = setup(args)
    if not args.eval_only:
        return train(cfg, args.resume)
    model = build_model(cfg)
    WholeCheckpointer(model).load(cfg.train.init_checkpoint)
    return test(cfg, model)


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
