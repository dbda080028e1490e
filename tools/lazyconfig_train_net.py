#!/usr/bin/env python
r"""Train and evaluate a LazyConfig, with detectron2's standard flags; overrides are KEY=VALUE.

python tools/lazyconfig_train_net.py --num-gpus 8 \
    --config-file configs/lazy/mask_rcnn_R50_NL.py train.output_dir=output/R50
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, Union

import detectron2.utils.comm as comm
import torch
from detectron2.config import instantiate
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
from omegaconf import DictConfig

from nonlocal_det.config import load_lazy_config
from nonlocal_det.engine import check_dataset, one_sentence_errors
from nonlocal_det.modeling.checkpoint import NonLocalCheckpointer


def setup(args: Namespace) -> DictConfig:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        FileNotFoundError: for a missing configuration or dataset.
        ValueError: for an override that cannot be read, or a dataset name that does not exist.
    """
    cfg = load_lazy_config(args.config_file, args.opts)
    data = cfg.dataloader
    for loader in (data.test,) if args.eval_only else (data.train, data.test):
        for name in _names(loader.dataset.names):
            check_dataset(name)
    on_cpu = cfg.train.device == "cuda" and not torch.cuda.is_available()
    if on_cpu:
        cfg.train.device = "cpu"
    default_setup(cfg, args)
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
    trainer = trainer_class(model, instantiate(cfg.dataloader.train), instantiate(cfg.optimizer))
    checkpointer = NonLocalCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            _on_main(lambda: hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)),
            hooks.EvalHook(cfg.train.eval_period, lambda: test(cfg, model)),
            _on_main(
                lambda: hooks.PeriodicWriter(
                    default_writers(cfg.train.output_dir, cfg.train.max_iter),
                    period=cfg.train.log_period,
                )
            ),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    goes_on = resume and checkpointer.has_checkpoint()
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
    NonLocalCheckpointer(model).load(cfg.train.init_checkpoint)
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
