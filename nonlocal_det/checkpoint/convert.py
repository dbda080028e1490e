"""Conversion of weights from other implementations of the non-local block.

Each function takes the tensors of one block, by their names relative to it, and returns the state
dict of a `NonLocalBlock`, or of a `GlobalContextBlock`. With the settings it lists, outputs are
equal. With BN, ``out`` has no bias here: it is subtracted from the running mean, which is
equivalent. The other implementations round sizes down when they pool: with ``subsample``, outputs
are equal for even heights and widths.

Sources: mmcv (open-mmlab/mmcv, ``mmcv/cnn/bricks/non_local.py`` and ``context_block.py``),
AlexHex7/Non-local_pytorch (``lib/non_local_*.py``), facebookresearch/video-nonlocal-net
(``lib/models/nonlocal_helper.py``), facebookresearch/pytorchvideo
(``pytorchvideo/layers/nonlocal_net.py``), timm (huggingface/pytorch-image-models,
``timm/layers/non_local_attn.py`` and ``global_context.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

_EMBEDDINGS = ("theta", "phi", "g")
_WEIGHT_AND_BIAS = ("weight", "bias")


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
    _reshape_kernels(block, dims)
    for part in _convolutions(block):
        # With its NO_BIAS there are none.
        weight = block[f"{part}.weight"]
        block.setdefault(f"{part}.bias", weight.new_zeros(weight.shape[0]))
    if "norm.weight" in block and "norm.running_mean" not in block:
        _fold_affine(block)
    return _finish(block)


def convert_pytorchvideo(state: Mapping[str, Tensor], dims: int = 3) -> dict[str, Tensor]:
    """Convert a ``NonLocal`` of pytorchvideo, such as ``create_nonlocal`` makes.

    Settings for equal outputs: ``pool_first`` True; ``subsample`` as its ``pool_size``;
    ``pairwise`` "embedded_gaussian" with ``scale`` True for its ``instantiation`` "softmax", or
    "dot_product"; ``inner_channels`` as its ``dim_inner``; ``norm`` "BN", or "" without its
    ``norm``.

    Args:
        state: Tensors of the block.
        dims: Number of spatial dimensions of the new block. With 2, it computes for an image what
            the other does for a clip of one frame.

    Raises:
        ValueError: If the names are not those of such a block.
    """
    names = {f"conv_{part}": part for part in (*_EMBEDDINGS, "out")}
    block = _rename(state, {**names, "norm": "norm"}, "pytorchvideo's NonLocal")
    _reshape_kernels(block, dims)
    return _finish(block)


def convert_timm(state: Mapping[str, Tensor], use_scale: bool = True) -> dict[str, Tensor]:
    """Convert a ``NonLocalAttn`` of timm.

    Settings for equal outputs: ``scale`` False; ``inner_channels`` as its ``rd_channels``. It
    divides logits by the square root of C, not of D: theta is divided by it instead.

    Args:
        state: Tensors of the block.
        use_scale: Its option of that name.

    Raises:
        ValueError: If the names are not those of such a block.
    """
    names = {"t": "theta", "p": "phi", "g": "g", "z": "out", "norm": "norm"}
    block = _rename(state, names, "timm's NonLocalAttn")
    if use_scale:
        root = block["theta.weight"].shape[1] ** 0.5
        block.update({f"theta.{leaf}": block[f"theta.{leaf}"] / root for leaf in _WEIGHT_AND_BIAS})
    return _finish(block)


def convert_mmcv_context(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a ``ContextBlock`` of mmcv to the state dict of a `GlobalContextBlock`.

    Settings for equal outputs: its ``pooling_type`` "att" and ``fusion_types`` "channel_add", the
    defaults; ``inner_channels`` of channels times its ``ratio``.

    Args:
        state: Tensors of the block.

    Raises:
        ValueError: If the names are not those of such a block.
    """
    names = {"conv_mask": "w_k"}
    for i, part in ((0, "w_v1"), (1, "layer_norm"), (3, "out")):
        names[f"channel_add_conv.{i}"] = part
    return _context(state, names, "mmcv's ContextBlock with attention pooling and addition")


def convert_timm_context(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a ``GlobalContext`` of timm to the state dict of a `GlobalContextBlock`.

    Settings for equal outputs: its ``fuse_add`` True and ``fuse_scale`` False, which are not the
    defaults; ``inner_channels`` as its ``rd_channels``. Its layer norm has an eps of 1e-6, ours of
    1e-5.

    Args:
        state: Tensors of the block.

    Raises:
        ValueError: If the names are not those of such a block.
    """
    names = {"conv_attn": "w_k", "mlp_add.fc1": "w_v1", "mlp_add.norm": "layer_norm"}
    names["mlp_add.fc2"] = "out"
    return _context(state, names, "timm's GlobalContext with attention and addition")


def _context(
    state: Mapping[str, Tensor], names: Mapping[str, str], source: str
) -> dict[str, Tensor]:
    """Rename the tensors of a global context block, whose layer norm may have spatial sizes."""
    block = _rename(state, names, source, required=names.values())
    names_of_norm = [f"layer_norm.{leaf}" for leaf in _WEIGHT_AND_BIAS]
    return {**block, **{name: block[name].flatten() for name in names_of_norm}}


def _rename(
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    source: str,
    required: Collection[str] = ("g", "out"),
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
    expected = {f"{part}.weight" for part in required}
    missing = (expected | (embedded if embedded & renamed.keys() else set())) - renamed.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} is missing, which a block of {source} has.")
    return renamed


def _convolutions(block: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of a block's convolutions."""
    return ("g", "out", *(("theta", "phi") if "theta.weight" in block else ()))


def _reshape_kernels(block: dict[str, Tensor], dims: int) -> None:
    """Give the 1 x 1 x 1 kernels so many spatial dimensions."""
    for part in _convolutions(block):
        weight = block[f"{part}.weight"]
        block[f"{part}.weight"] = weight.reshape(*weight.shape[:2], *[1] * dims)


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
