"""What the command lines that look at attention share: which model, and where to write."""

from __future__ import annotations

import argparse
import os

import torch
from detectron2.config import CfgNode

from ..config import load_config
from ..engine.preflight import check_inference_cfg

_PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_DEMO_CONFIG = os.path.join(_PROJECT, "configs", "lamps_mask_rcnn_R18_NL.yaml")
_DEMO_WEIGHTS = os.path.join(_PROJECT, "output", "demo", "model_final.pth")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model, and the output folder."""
    parser.add_argument("--config-file", help="of the model; by default the demo's")
    parser.add_argument("--weights", help="checkpoint; by default MODEL.WEIGHTS, or the demo's")
    parser.add_argument("--output", required=True, help="folder for what is written")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="configuration, at the end: KEY VALUE ..."
    )


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """The configuration with its weights, on a device that there is.

    Raises:
        FileNotFoundError: if there is no such configuration, or there are no such weights.
        ValueError: if the configuration is wrong or has no blocks.
    """
    cfg = load_config(args.config_file or _DEMO_CONFIG, args.opts)
    weights = args.weights or cfg.MODEL.WEIGHTS
    if not args.config_file and not weights:
        weights = _DEMO_WEIGHTS
        if not os.path.isfile(weights):
            raise FileNotFoundError(
                f"There is no {os.path.relpath(weights)}: run tools/demo.py first, or name a model "
                f"with --config-file and --weights."
            )
    if not cfg.MODEL.NONLOCAL.POSITIONS:
        raise ValueError(
            "The model has no non-local blocks to look at: MODEL.NONLOCAL.POSITIONS is empty."
        )
    cfg.MODEL.WEIGHTS = weights
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_inference_cfg(cfg)
    return cfg
