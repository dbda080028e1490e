"""Arguments shared by the attention commands: the model, its datasets and the output folder."""

from __future__ import annotations

import argparse
import os

from detectron2.config import CfgNode

from ..config import load_config
from ..engine.custom_data import add_dataset_options, load_custom_datasets
from ..engine.model_check import prepare_inference_cfg
from ..utils.outputs import HIDDEN_FOLDER

_DEMO_CONFIG = "demo_mask_rcnn_R18_C3_NL.yaml"  # of the model zoo
_DEMO_WEIGHTS = os.path.join("output", "demo", "with_block", "model_final.pth")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the model, custom datasets, and the output folder."""
    add = parser.add_argument
    add("--config-file", help="config file of the model (default: the demo's config)")
    add("--weights", help="checkpoint (default: MODEL.WEIGHTS of the config, or the demo's)")
    add("--output", required=True, help="output folder")
    add_dataset_options(parser)
    add("opts", nargs=argparse.REMAINDER, help="config options at the end: KEY VALUE ...")


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """Create the config of the model, with its weights and datasets, on an available device.

    Custom datasets given on the command line are registered; a corrected copy of one is written
    into the hidden folder of the output folder.

    Args:
        args: Parsed options of `add_model_arguments`.

    Returns:
        detectron2 config with ``MODEL.WEIGHTS`` and ``MODEL.DEVICE``.

    Raises:
        FileNotFoundError: If the config file or the checkpoint does not exist.
        ValueError: If the config or a dataset is invalid, or the model has no non-local blocks.
    """
    cfg = load_config(args.config_file or _DEMO_CONFIG, args.opts)
    weights = args.weights or cfg.MODEL.WEIGHTS
    if not args.config_file and not weights:
        weights = _DEMO_WEIGHTS
        if not os.path.isfile(weights):
            raise FileNotFoundError(
                f"There is no {weights}: run the demo here first, or select a model with "
                f"--config-file and --weights."
            )
    if not cfg.MODEL.NONLOCAL.POSITIONS:
        raise ValueError("The model has no non-local blocks (MODEL.NONLOCAL.POSITIONS is empty).")
    cfg.MODEL.WEIGHTS = weights
    cfg.OUTPUT_DIR = os.path.join(args.output, HIDDEN_FOLDER)
    args.eval_only = not args.train_json  # then the dataset for evaluation is enough
    args.resume = False
    datasets = load_custom_datasets(cfg, args)
    datasets.apply_to(cfg)
    prepare_inference_cfg(cfg)
    datasets.write_and_log(cfg)
    return cfg
