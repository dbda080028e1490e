"""Arguments shared by the attention commands: the model and the output folder."""

from __future__ import annotations

import argparse
import os

from detectron2.config import CfgNode

from ..config import load_config
from ..engine.model_check import prepare_inference_cfg

_DEMO_CONFIG = "lamps_mask_rcnn_R18_NL.yaml"  # of the model zoo
_DEMO_WEIGHTS = os.path.join("output", "demo", "model_final.pth")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the model, and the output folder."""
    add = parser.add_argument
    add("--config-file", help="config file of the model (default: the demo's config)")
    add("--weights", help="checkpoint (default: MODEL.WEIGHTS of the config, or the demo's)")
    add("--output", required=True, help="output folder")
    add("opts", nargs=argparse.REMAINDER, help="config options at the end: KEY VALUE ...")


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """Create the config of the model, with its weights, on an available device.

    Args:
        args: Parsed options of `add_model_arguments`.

    Returns:
        detectron2 config with ``MODEL.WEIGHTS`` and ``MODEL.DEVICE``.

    Raises:
        FileNotFoundError: If the config file or the checkpoint does not exist.
        ValueError: If the config is invalid or has no non-local blocks.
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
    prepare_inference_cfg(cfg)
    return cfg
