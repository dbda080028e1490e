"""Loading weights into a model with blocks, with a one-line report of what was loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from ..layers.base import NonLocalBase
from .safe_load import load_pkl, load_pth


class _TensorCheckpointer(Checkpointer):
    """fvcore's checkpointer, below detectron2's, reading only tensors and knowing their names."""

    def _load_file(self, path: str) -> Any:
        return load_pth(path)

    def _load_model(self, checkpoint: Any) -> Any:
        tensors = checkpoint["model"]
        incompatible = super()._load_model(checkpoint)
        self._loaded = set(tensors)  # those of another shape have been removed
        return incompatible


class NonLocalCheckpointer(DetectionCheckpointer, _TensorCheckpointer):
    """detectron2's checkpointer, whose report tells new blocks from tensors missing by mistake.

    It runs no code that a file may contain; see `safe_load`. It also loads torchvision's ResNet
    checkpoints directly. Such models need RGB images, a pixel standard deviation, and STRIDE_IN_1X1
    False.

    Attributes:
        load_report: `LoadReport` of the latest load.
    """

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            return _load_model_zoo_file(filename)
        loaded = super()._load_file(filename)
        if "layer1.0.conv1.weight" in loaded["model"]:
            return {"model": convert_torchvision(loaded["model"]), "matching_heuristics": True}
        return loaded

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        if incompatible is not None:
            self.load_report = _load_report(self.model, self._loaded, incompatible)
            self.logger.info(str(self.load_report))
        return incompatible


@dataclass(frozen=True)
class LoadReport:
    """Result of loading a checkpoint into a model.

    Attributes:
        loaded: Tensors of the model that were loaded.
        new_blocks: Blocks of which the checkpoint has no tensor.
        missing_keys: Other tensors of the model that the checkpoint does not have.
        incorrect_shapes: Tensors that have another shape in the checkpoint.
        unexpected_keys: Tensors of the checkpoint that the model does not have.
    """

    loaded: set[str]
    new_blocks: list[str]
    missing_keys: set[str]
    incorrect_shapes: set[str]
    unexpected_keys: set[str]

    @property
    def is_complete(self) -> bool:
        """Whether checkpoint and model have exactly the same tensors."""
        return not (
            self.new_blocks or self.missing_keys or self.incorrect_shapes or self.unexpected_keys
        )

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts.append(
            f"{len(self.new_blocks)} new blocks: {', '.join(self.new_blocks)}"
            if self.new_blocks
            else "no new block"
        )
        for problem, keys in (
            ("not in the checkpoint", self.missing_keys),
            ("of another shape", self.incorrect_shapes),
            ("unexpected in the checkpoint", self.unexpected_keys),
        ):
            if keys:
                shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
                parts.append(f"{len(keys)} {problem}: {shown}")
        return "; ".join(parts) + "."


def _load_report(model: nn.Module, loaded: set[str], incompatible: Any) -> LoadReport:
    incorrect_shapes = {entry[0] for entry in incompatible.incorrect_shapes}
    missing = set(incompatible.missing_keys) - incorrect_shapes
    expected = model.state_dict().keys()
    keys_of = {
        name: {f"{name}.{key}" for key in module.state_dict()}
        for name, module in model.named_modules()
        if isinstance(module, NonLocalBase)
    }
    # A block with any loaded tensor is not new: the ones it lacks are reported as missing.
    given = loaded | incorrect_shapes
    new = [name for name, keys in keys_of.items() if keys.isdisjoint(given)]
    return LoadReport(
        # Norms fill in statistics that a checkpoint does not have; by themselves they are nothing.
        loaded=expected - missing - incorrect_shapes if expected & loaded else set(),
        new_blocks=new,
        missing_keys=missing.difference(*(keys_of[name] for name in new)),
        incorrect_shapes=incorrect_shapes,
        unexpected_keys=set(incompatible.unexpected_keys),
    )


def _load_model_zoo_file(path: str) -> dict[str, Any]:
    """Read detectron2's, Caffe2's (``.pkl``) or pycls' (``.pyth``) weights, as detectron2 does."""
    if path.endswith(".pyth"):
        weights = load_pth(path)["model_state"]
        author, unused = "pycls", "num_batches_tracked"
    else:
        loaded = load_pkl(path)
        if "model" in loaded and "__author__" in loaded:
            return loaded
        # Caffe2's detectors have their weights under "blobs", its ImageNet models do not.
        weights = loaded.get("blobs", loaded)
        author, unused = "Caffe2", "_momentum"
    kept = {name: weight for name, weight in weights.items() if not name.endswith(unused)}
    return {"model": kept, "__author__": author, "matching_heuristics": True}


def convert_torchvision(weights: dict[str, Any]) -> dict[str, Any]:
    """Rename a torchvision ResNet's tensors to detectron2's names: ``layer1`` is ``res2``."""
    renamed = {}
    for key, value in weights.items():
        name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", key)
        name = re.sub(r"^(conv1|bn1)\b", r"stem.\1", name)
        name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name] = value
    return renamed
