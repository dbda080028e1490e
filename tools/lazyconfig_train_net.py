#!/usr/bin/env python
r"""Train and evaluate a LazyConfig, with detectron2's standard flags; overrides are KEY=VALUE.

python tools/lazyconfig_train_net.py --num-gpus 8 \
    --config-file configs/lazy/mask_rcnn_R50_NL.py train.output_dir=output/R50
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, Optional, Union

import detectron2.utils.comm as comm
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from hydra.errors import HydraException
from omegaconf import DictConfig

from nonlocal_det.engine import (
    Step,
    check_batch,
    check_dataset,
    device_of,
    for_all_processes,
    launch,
    mixed_precision,
    one_sentence_errors,
    process_count,
    say_device,
)
from nonlocal_det.modeling.checkpoint import NonLocalCheckpointer


def setup(args: Namespace) -> DictConfig:
    """The configuration of detectron2's standard arguments, checked before anything is written.

    Raises:
        FileNotFoundError, ValueError: as `checked_config`.
    """
    cfg, device = checked_config(args)
    asked, cfg.train.device = cfg.train.device, device
    default_setup(cfg, args)
    say_device(asked, device)
    return cfg


def checked_config(args: Namespace) -> tuple[DictConfig, str]:
    """The configuration, and the device that it is to run on; nothing is written.

    Raises:
        FileNotFoundError: for a missing configuration or dataset.
        ValueError: for an override that cannot be read, a dataset name that does not exist, a
            batch that cannot be divided, or processes that cannot be started.
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
    device = device_of(cfg.train.device, "train.device=cpu", args)
    _precision(cfg, device)
    if not args.eval_only:
        pictures = {"dataloader.train.total_batch_size": data.train.total_batch_size}
        passes = {"train.accumulation_steps": _passes(cfg)}
        check_batch(pictures, passes, process_count(args))
    return cfg, device


def _names(names: Union[str, Iterable[str]]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _passes(cfg: DictConfig) -> int:
    """As ``SOLVER.ACCUMULATION_STEPS``."""
    return cfg.train.get("accumulation_steps", 1)


def _precision(cfg: DictConfig, device: str) -> Optional[torch.dtype]:
    """As ``SOLVER.AMP``."""
    amp = cfg.train.amp
    if not amp.enabled:
        return None
    return mixed_precision("train.amp.dtype", amp.get("dtype", "float16"), device)


def build_model(cfg: DictConfig) -> torch.nn.Module:
    """The model, on its device, and for all processes where there are several."""
    with one_sentence_errors():
        model = instantiate(cfg.model).to(cfg.train.device)
    return for_all_processes(model, **cfg.train.ddp)


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
    trainer = Step(
        model,
        instantiate(cfg.dataloader.train),
        instantiate(cfg.optimizer),
        passes=_passes(cfg),
        precision=_precision(cfg, cfg.train.device),
    )
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
    launch(main, default_argument_parser().parse_args(), checked_config)
