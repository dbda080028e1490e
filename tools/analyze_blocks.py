#!/usr/bin/env python
"""What the blocks of a configuration add to its model: parameters and FLOPs, block by block.

    python tools/analyze_blocks.py --config-file configs/mask_rcnn_R50_NL.yaml

A FLOP is one multiplication with its addition, as fvcore counts. The model has new weights and sees
one picture of the mean colour, so that all features are zero and all boxes are anchors: it keeps as
many proposals and finds as many objects as it may. Without its blocks it is the stock model, which
needs no second count.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from typing import Any, Optional

import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape

from nonlocal_det.config import load_config, load_lazy_config
from nonlocal_det.engine.preflight import build_on_meta_device
from nonlocal_det.errors import exit_on_error
from nonlocal_det.layers import NonLocalBase
from nonlocal_det.utils.file_io import ensure_writable_dir


def analyze(model: torch.nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters and FLOPs of a detector without its blocks, and of each block.

    Args:
        model: a detectron2 model on a CPU.
        size: height and width of the picture that it sees.

    Returns:
        ``stock`` and ``total``, and in ``blocks`` by name, each with ``parameters`` and ``flops``.
    """
    inputs = [{"image": model.pixel_mean.expand(3, *size)}]
    with torch.no_grad():
        flops = count(model.eval(), inputs)
    blocks = {
        name: {"parameters": parameters(module), "flops": flops[name]}
        for name, module in model.named_modules()
        if isinstance(module, NonLocalBase)
    }
    total = {"parameters": parameters(model), "flops": flops[""]}
    stock = {
        key: value - sum(block[key] for block in blocks.values()) for key, value in total.items()
    }
    return {"size": list(size), "stock": stock, "blocks": blocks, "total": total}


def count(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]]) -> dict[str, int]:
    """FLOPs of every module, by its name; of the whole model under ""."""
    analysis = FlopCountAnalysis(model, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # A trace writes a block's fast sums in ordinary operators; fvcore does not know all of them.
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    analysis.set_op_handle("aten::cumsum", elements)
    analysis.set_op_handle("aten::addcmul", elements)
    # The analysis counts the model as a part of an adapter.
    return {name.partition(".")[2]: n for name, n in analysis.by_module().items()}


def attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """N M (D + V) for queries (..., N, D), keys (..., M, D) and values (..., M, V)."""
    query, key, value = (get_shape(unpadded(x)) for x in inputs[:3])
    pairs = key[-2]
    for extent in query[:-1]:
        pairs *= extent
    return pairs * (query[-1] + value[-1])


def unpadded(x: Any) -> Any:
    """What was padded with zeros; a CPU's fused kernel wants values as wide as keys."""
    node = x.node()
    if node.kind() in ("aten::pad", "aten::constant_pad_nd"):
        return next(node.inputs())
    return x


def elements(inputs: list[Any], outputs: list[Any]) -> int:
    """The numbers of the result: one addition each, of floats."""
    if not outputs[0].type().dtype().is_floating_point:
        return 0  # the search for padding counts pixels
    return int(torch.Size(get_shape(outputs[0])).numel())


def parameters(module: torch.nn.Module) -> int:
    """How many numbers can be learned, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def table(found: dict[str, Any]) -> str:
    """The stock model, each block, and all, a line each."""
    rows = {"without blocks": found["stock"], **found["blocks"], "with blocks": found["total"]}
    width = max(map(len, rows))
    lines = [f"{'':<{width}}{'parameters':>14}{'':>9}{'GFLOPs':>12}"]
    for name, row in rows.items():
        shares = [row[key] / found["stock"][key] for key in ("parameters", "flops")]
        lines.append(
            f"{name:<{width}}{row['parameters']:>14,}{shares[0]:>9.2%}"
            f"{row['flops'] / 1e9:>12.3f}{shares[1]:>9.2%}"
        )
    return "\n".join(lines)


def build(config_file: str, options: list[str]) -> torch.nn.Module:
    """The model of a YAML file or a LazyConfig, with new weights, on the CPU, dropping no box.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: for a wrong key, value or position.
    """
    if config_file.endswith(".py"):
        cfg = load_lazy_config(config_file, options)
        cfg.model.proposal_generator.nms_thresh = 1.0
        cfg.model.roi_heads.box_predictor.update(test_score_thresh=0.0, test_nms_thresh=1.0)
        return instantiate(cfg.model)
    cfg = load_config(config_file, options)
    cfg.MODEL.DEVICE = "cpu"
    build_on_meta_device(cfg)  # says what is wrong
    cfg.MODEL.RPN.NMS_THRESH = 1.0
    for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        node.SCORE_THRESH_TEST, node.NMS_THRESH_TEST = 0.0, 1.0
    return build_model(cfg)


def parse_args(arguments: Optional[list[str]] = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--config-file", required=True, help="a YAML file or a LazyConfig")
    add(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="of the picture in pixels; 800 1333 by default",
    )
    add("--json", help="a file to write the figures to")
    add("opts", nargs="*", help="KEY VALUE pairs over the YAML file, KEY=VALUE over a LazyConfig")
    options = parser.parse_args(arguments)
    if min(options.size) < 1:
        parser.error(f"--size {options.size[0]} {options.size[1]}: both must be at least 1.")
    return options


def main(arguments: Optional[list[str]] = None) -> None:
    """Count, print, write."""
    options = parse_args(arguments)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with exit_on_error():
        if options.json:
            ensure_writable_dir(os.path.dirname(options.json) or ".", "The folder of --json")
        found = analyze(build(options.config_file, options.opts), tuple(options.size))
        print(f"{options.config_file}, {options.size[0]} x {options.size[1]} pixels")
        print(table(found))
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump({"config": options.config_file, **found}, file, indent=2)


if __name__ == "__main__":
    main()
