"""Parameters and FLOPs that the blocks of a configuration add to its detector, block by block.

A FLOP is one multiplication with its addition, as fvcore counts. The model has new weights and gets
one image of the mean color: all features are zero and all boxes are anchors, so that it keeps as
many proposals and predicts as many objects as it may. Without its blocks it is the baseline, which
needs no second count.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn

from ..config import load_config, load_lazy_config
from ..engine.model_check import build_on_meta_device
from ..layers import NonLocalBase
from ..utils.config_files import find_config_file


def analyze(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Count parameters and FLOPs of a detector without its blocks, and of each block.

    Args:
        model: Detectron2 model on a CPU.
        size: Height and width of the input image in pixels.

    Returns:
        The ``size``; under ``baseline``, ``total`` and, in ``blocks``, each block's name, counts of
        ``parameters`` and ``flops``.
    """
    inputs = [{"image": model.pixel_mean.expand(3, *size)}]
    with torch.no_grad():
        flops = count_flops(model.eval(), inputs)
    blocks = {
        name: {"parameters": count_parameters(module), "flops": flops[name]}
        for name, module in model.named_modules()
        if isinstance(module, NonLocalBase)
    }
    total = {"parameters": count_parameters(model), "flops": flops[""]}
    baseline = {
        key: value - sum(block[key] for block in blocks.values()) for key, value in total.items()
    }
    return {"size": list(size), "baseline": baseline, "blocks": blocks, "total": total}


def count_flops(model: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> dict[str, int]:
    """FLOPs of every module by its name; those of the whole model under ""."""
    analysis = FlopCountAnalysis(model, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # In a trace, a block's fast sums are ordinary operators, some of which fvcore does not know.
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    analysis.set_op_handle("aten::cumsum", _one_per_element)
    analysis.set_op_handle("aten::addcmul", _one_per_element)
    # The analysis counts the model as a child of an adapter.
    return {name.partition(".")[2]: n for name, n in analysis.by_module().items()}


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """N M (D + V) for queries (..., N, D), keys (..., M, D) and values (..., M, V)."""
    query, key, value = (get_shape(_before_padding(x)) for x in inputs[:3])
    pairs = key[-2]
    for extent in query[:-1]:
        pairs *= extent
    return pairs * (query[-1] + value[-1])


def _before_padding(x: Any) -> Any:
    """The input of a zero padding: a CPU's fused kernel wants values as wide as keys."""
    node = x.node()
    if node.kind() in ("aten::pad", "aten::constant_pad_nd"):
        return next(node.inputs())
    return x


def _one_per_element(inputs: list[Any], outputs: list[Any]) -> int:
    """One addition for each element of a floating-point result."""
    if not outputs[0].type().dtype().is_floating_point:
        return 0  # the padding mask counts pixels
    return int(torch.Size(get_shape(outputs[0])).numel())


def count_parameters(module: nn.Module) -> int:
    """Number of elements of all parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def analysis_table(found: dict[str, Any]) -> str:
    """The result of `analyze` as text: one line each for baseline, every block and the total."""
    rows = {"without blocks": found["baseline"], **found["blocks"], "with blocks": found["total"]}
    width = max(map(len, rows))
    lines = [f"{'':<{width}}{'parameters':>14}{'':>9}{'GFLOPs':>12}"]
    for name, row in rows.items():
        shares = [row[key] / found["baseline"][key] for key in ("parameters", "flops")]
        lines.append(
            f"{name:<{width}}{row['parameters']:>14,}{shares[0]:>9.2%}"
            f"{row['flops'] / 1e9:>12.3f}{shares[1]:>9.2%}"
        )
    return "\n".join(lines)


def build_for_analysis(config_file: str, options: list[str]) -> nn.Module:
    """Build a model with new weights on the CPU that discards no box.

    Args:
        config_file: Path of a YAML file or a LazyConfig, or its name in the model zoo.
        options: KEY VALUE pairs over a YAML file, KEY=VALUE over a LazyConfig.

    Raises:
        FileNotFoundError: If the configuration does not exist.
        ValueError: If a key, value or position is wrong.
    """
    config_file = find_config_file(config_file)
    if config_file.endswith(".py"):
        cfg = load_lazy_config(config_file, options)
        cfg.model.proposal_generator.nms_thresh = 1.0
        cfg.model.roi_heads.box_predictor.update(test_score_thresh=0.0, test_nms_thresh=1.0)
        return instantiate(cfg.model)
    cfg = load_config(config_file, options)
    cfg.MODEL.DEVICE = "cpu"
    build_on_meta_device(cfg)  # reports what is wrong with the configuration
    cfg.MODEL.RPN.NMS_THRESH = 1.0
    for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        node.SCORE_THRESH_TEST, node.NMS_THRESH_TEST = 0.0, 1.0
    return build_model(cfg)
