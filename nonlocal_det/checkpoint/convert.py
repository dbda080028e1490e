"""Conversion of weights from other implementations of the non-local block.

Each function takes the tensors of one block, by their names relative to it, and returns the state
dict of a `NonLocalBlock`. With the settings it lists, outputs are equal. With BN, ``out`` has no
bias here: it is subtracted from the running mean, which is equivalent. The other implementations
round sizes down when they pool: with ``subsample``, outputs are equal for even heights and widths.

Sources: mmcv (open-mmlab/mmcv, ``mmcv/cnn/bricks/non_local.py``), AlexHex7/Non-local_pytorch
(``lib/non_local_*.py``), facebookresearch/video-nonlocal-net (``lib/models/nonlocal_helper.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_EMBEDDINGS = ("theta", "phi", "g")


def convert_mmcv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a ``NonLocal1d``, ``NonLocal2d`` or ``NonLocal3d`` of mmcv.

    Settings for equal outputs: ``pairwise`` as its ``mode``; with a softmax, ``scale`` as its
    ``use_scale``, True by default, but False in mode "gaussian", which mmcv never scales;
    ``subsample`` as its ``sub_sample``; ``inner_channels`` of channels // its ``reduction``;
    ``norm`` "BN" or "GN" as its ``norm_cfg``, "" without one.

    Args:
        state: Tensors of the block.

    Raises:
        ValueError: If the names are not those of such a block.
    """
    names = {"conv_out.conv": "out", "concat_project.conv.weight": "w_f"}
    names.update({f"conv_out.{norm}": "norm" for norm in ("bn", "gn")})
    # With sub_sample, phi and g are sequences, of which the first is the convolution.
    names.update({f"{e}{first}.conv": e for e in _EMBEDDINGS for first in ("", ".0")})
    return _finish(_rename(state, names, "mmcv's NonLocalNd"))


def convert_alexhex7(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert AlexHex7's ``NONLocalBlock1D``, ``NONLocalBlock2D`` or ``NONLocalBlock3D``.

    Settings for equal outputs: ``pairwise`` as in the name of its file; ``subsample`` as its
    ``sub_sample``, True by default; ``norm`` "BN" with its ``bn_layer``, the default, else "";
    ``scale`` False.

    Args:
        state: Tensors of the block.

    Raises:
        ValueError: If the names are not those of such a block.
    """
    names = {"W.0": "out", "W.1": "norm", "W": "out", "concat_project.0.weight": "w_f"}
    names.update({f"{e}{first}": e for e in _EMBEDDINGS for first in (".0", "")})
    return _finish(_rename(state, names, "AlexHex7's NONLocalBlockND"))


def convert_caffe2(blobs: Mapping[str, Any], prefix: str, dims: int = 2) -> dict[str, Tensor]:
    """Convert one block of the official Caffe2 code.

    Settings for equal outputs: ``pool_first`` and ``subsample`` True with its USE_MAXPOOL;
    ``scale`` as its USE_SCALE, or ``pairwise`` "dot_product" without its USE_SOFTMAX; ``norm``
    "BN" with its USE_BN, else "". With its USE_AFFINE, the frozen scale and shift are multiplied
    into ``out``.

    Args:
        blobs: Arrays by name; those of the entire model are accepted.
        prefix: Prefix of the block's blobs, such as ``"nonlocal_conv4_4"``.
        dims: Number of spatial dimensions of the new block. The Caffe2 kernels are 1 x 1 x 1.

    Raises:
        ValueError: If there are no such blobs, or the names are not those of a block.
    """
    state = {
        name[len(prefix) + 1 :]: torch.as_tensor(blob)
        for name, blob in blobs.items()
        if name.startswith(f"{prefix}_") and not name.endswith("_momentum")
    }
    names = {"bn_s": "norm.weight", "bn_b": "norm.bias"}
    names.update({"bn_rm": "norm.running_mean", "bn_riv": "norm.running_var"})
    for part in (*_EMBEDDINGS, "out"):
        names.update({f"{part}_w": f"{part}.weight", f"{part}_b": f"{part}.bias"})
    block = _rename(state, names, f"the Caffe2 code, after {prefix!r}")
    for part in ("g", "out", *(("theta", "phi") if "theta.weight" in block else ())):
        weight = block[f"{part}.weight"]
        block[f"{part}.weight"] = weight.reshape(*weight.shape[:2], *[1] * dims)
        # With its NO_BIAS there are none.
        block.setdefault(f"{part}.bias", weight.new_zeros(weight.shape[0]))
    if "norm.weight" in block and "norm.running_mean" not in block:
        _fold_affine(block)
    return _finish(block)


def _rename(
    state: Mapping[str, Tensor], names: Mapping[str, str], source: str
) -> dict[str, Tensor]:
    """Rename tensors; ``names`` maps names of tensors, or of the modules that contain them."""
    renamed = {}
    for key, value in state.items():
        parent, _, leaf = key.rpartition(".")
        if key in names:
            renamed[names[key]] = value
        elif parent in names:
            renamed[f"{names[parent]}.{leaf}"] = value
        else:
            raise ValueError(
                f"{key!r} is not a tensor of {source}; it has {', '.join(sorted(names))}."
            )
    embedded = {"theta.weight", "phi.weight"}
    # A block with the Gaussian function has neither theta nor phi.
    expected = {"g.weight", "out.weight", *(embedded if embedded & renamed.keys() else ())}
    missing = expected - renamed.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} is missing, which a block of {source} has.")
    return renamed


def _finish(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flatten w_f, and under a norm fold the bias of ``out`` into the running mean."""
    if "w_f" in block:
        block["w_f"] = block["w_f"].flatten()
    if "norm.weight" not in block:
        return block
    bias = block.pop("out.bias", None)
    if bias is None:
        return block
    if "norm.running_mean" not in block:
        raise ValueError("out has a bias under a norm without running statistics.")
    block["norm.running_mean"] = block["norm.running_mean"] - bias
    return block


def _fold_affine(block: dict[str, Tensor]) -> None:
    """Multiply the frozen scale and shift after ``out`` into its weight and bias."""
    scale, shift = block.pop("norm.weight"), block.pop("norm.bias")
    weight = block["out.weight"]
    block["out.weight"] = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    block["out.bias"] = block["out.bias"] * scale + shift
