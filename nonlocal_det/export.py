"""Export of detectors to TorchScript or ONNX, and comparison of the files with the models.

An exported model takes an image (3, H, W) of any size, float32 in the channel order of
``INPUT.FORMAT``, and returns one image's detections before masks are pasted and boxes are rescaled:
boxes in the image's pixels, and masks of 28 x 28.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Optional

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import GeneralizedRCNN, RetinaNet, build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .checkpoint.detection_checkpoint import NonLocalCheckpointer
from .config import load_config
from .engine import check_dataset_registered
from .engine.model_check import prepare_inference_cfg
from .utils.file_io import ensure_writable_dir
from .utils.outputs import CommandOutputs

FORMATS = {"torchscript": "model.ts", "onnx": "model.onnx"}  # and the name of the file
METHODS = ("tracing", "scripting")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")

Detections = dict[str, Tensor]
Exported = Callable[[Tensor], Detections]

OPSET = 17
# Fields that detections may have, which TorchScript has to know beforehand.
FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
    "pred_keypoints": Tensor,
    "pred_keypoint_heatmaps": Tensor,
}
TOLERANCE = 1e-3  # relative to the largest value of each output


def export_and_compare(
    config_file: str,
    options: Sequence[str],
    output: str,
    *,
    file_format: str = "torchscript",
    method: str = "tracing",
    sample_image: Optional[str] = None,
) -> Iterator[str]:
    """Export a detector, and run the file and the model on two images.

    Args:
        config_file: Path of a YAML file, or its name in the model zoo.
        options: Keys and values in turn over the file's, ``MODEL.WEIGHTS`` among them.
        output: Folder for the exported file; it is created.
        file_format: Format of the exported file, one of `FORMATS`.
        method: Way of exporting, one of `METHODS`; ONNX is exported by tracing.
        sample_image: Path of the image to trace with; by default the first of ``DATASETS.TEST``.

    Yields:
        A line when the file is written, and one per image that was compared.

    Raises:
        OSError: If a file is missing, if the folder is not writable, or if it has a file of that
            name that is no earlier export.
        ValueError: If the model cannot be exported, or the file's results differ from its own.
    """
    if (file_format, method) == ("onnx", "scripting"):
        raise ValueError("ONNX is exported by tracing: use --export-method tracing.")
    missing = [name for name in ONNX_PACKAGES if file_format == "onnx" and find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The export to ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}."
        )
    outputs, path = CommandOutputs("export"), os.path.join(output, FORMATS[file_format])
    outputs.check(path)
    cfg = load_config(config_file, options)
    prepare_inference_cfg(cfg)
    image = load_sample(cfg, sample_image)
    model = load_model(cfg)
    ensure_writable_dir(output)
    with outputs.drafts(output) as drafts:
        exported = export(model, image, method, os.path.join(drafts, os.path.basename(path)))
    yield f"Wrote {path}."
    for sample in (image, transposed(image)):
        yield compare_outputs(detections(model, sample), exported(sample), sample)


def load_model(cfg: CfgNode) -> nn.Module:
    """Build the model with its weights, in evaluation mode.

    Raises:
        ValueError: If its outputs are not detections.
    """
    model = build_model(cfg).eval()
    if not isinstance(model, (GeneralizedRCNN, RetinaNet)):
        raise ValueError(
            f"A {type(model).__name__} cannot be exported: detectron2 exports GeneralizedRCNN and "
            f"RetinaNet, whose results are detections."
        )
    NonLocalCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def load_sample(cfg: CfgNode, path: Optional[str] = None) -> Tensor:
    """Read an image (3, H, W), float32, resized as in testing.

    Args:
        cfg: Configuration of the detector.
        path: Path of the image; by default the first of ``DATASETS.TEST``.
    """
    if path is None:
        check_dataset_registered(cfg.DATASETS.TEST[0])
        path = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]["file_name"]
    image = read_image(path, format=cfg.INPUT.FORMAT)
    shortest = cfg.INPUT.MIN_SIZE_TEST
    resize = T.ResizeShortestEdge([shortest, shortest], cfg.INPUT.MAX_SIZE_TEST)
    resized = resize.get_transform(image).apply_image(image)
    return torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))


def transposed(image: Tensor) -> Tensor:
    """The image with height and width swapped, at 0.7 times its size."""
    return nn.functional.interpolate(image.mT[None], scale_factor=0.7, mode="bilinear")[0]


def detections(model: nn.Module, image: Tensor) -> Detections:
    """Detections of the model itself in an image."""
    with torch.no_grad():
        return fields(infer(model, [{"image": image}])[0]["instances"])


def infer(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[dict[str, Instances]]:
    """Detections of the model, without pasted masks where it can leave pasting out."""
    if isinstance(model, GeneralizedRCNN):
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]
    return model(inputs)


def fields(instances: Instances) -> Detections:
    """Tensors of detections by name, in the order of `TracingAdapter`."""
    found = instances.get_fields()
    return {name: getattr(found[name], "tensor", found[name]) for name in sorted(found)}


def export(model: nn.Module, image: Tensor, method: str, path: str) -> Exported:
    """Write the file, and return a function that runs it.

    Args:
        model: Detector in evaluation mode.
        image: Image (3, H, W), float32, to trace with.
        method: Way of exporting, one of `METHODS`.
        path: Path of the file, whose ending, .onnx or .ts, decides the format.

    Raises:
        ValueError: If detectron2 or PyTorch cannot export this model.
    """
    trace = to_onnx if path.endswith(".onnx") else to_traced
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, about what a trace makes constant
            return to_scripted(model, path) if method == "scripting" else trace(model, image, path)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"This model cannot be exported to {os.path.basename(path)} by {method} with this "
            f"detectron2 and torch {torch.__version__}: {type(error).__name__}: {first}"
        ) from error


def to_traced(model: nn.Module, image: Tensor, path: str) -> Exported:
    """TorchScript by tracing; its outputs are a tuple."""
    adapter, names = adapted(model, image)
    torch.jit.trace(adapter, (image,), check_trace=False).save(path)
    traced = torch.jit.load(path)
    return lambda image: dict(zip(names, traced(image)))


def to_onnx(model: nn.Module, image: Tensor, path: str) -> Exported:
    """ONNX by tracing, for any height and width; its outputs have the names of the detections'."""
    import onnxruntime

    adapter, names = adapted(model, image)
    torch.onnx.export(
        adapter,
        (image,),
        path,
        dynamo=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=[*names, "image_size"],
        dynamic_axes={"image": {1: "height", 2: "width"}},
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Detections:
        found = session.run(names, {"image": image.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found)}

    return run


def adapted(model: nn.Module, image: Tensor) -> tuple[TracingAdapter, list[str]]:
    """The model with tensors as inputs and outputs, and the names of its outputs."""
    adapter = TracingAdapter(model, [{"image": image}], infer).eval()
    return adapter, list(detections(model, image))


class Scriptable(nn.Module):
    """A model whose outputs are dictionaries: PyTorch cannot save one that returns `Instances`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class ScriptableRCNN(Scriptable):
    """A GeneralizedRCNN whose outputs are dictionaries."""

    def forward(self, inputs: tuple[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Detections of each image of a batch."""
        return [i.get_fields() for i in self.model.inference(inputs, do_postprocess=False)]


class ScriptableRetinaNet(Scriptable):
    """A RetinaNet whose outputs are dictionaries."""

    def forward(self, inputs: tuple[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Detections of each image of a batch."""
        return [i.get_fields() for i in self.model(inputs)]


def to_scripted(model: nn.Module, path: str) -> Exported:
    """TorchScript by scripting: batches of any number of images, each of any size."""
    adapter = ScriptableRCNN if isinstance(model, GeneralizedRCNN) else ScriptableRetinaNet
    scripting_with_instances(adapter(model).eval(), FIELDS).save(path)
    scripted = torch.jit.load(path)

    def run(image: Tensor) -> Detections:
        return dict(sorted(scripted(({"image": image},))[0].items()))

    return run


def compare_outputs(expected: Detections, given: Detections, image: Tensor) -> str:
    """Compare the detections of a model and of its exported file in an image.

    Args:
        expected: Detections of the model.
        given: Detections of the file.
        image: Image (3, H, W) that both got.

    Returns:
        A line with the number of detections and the largest relative difference.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    size = f"{image.shape[1]} x {image.shape[2]} pixels"
    worst = 0.0
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise ValueError(
                f"The exported file differs from the model on {size}: {name} has the shape "
                f"{list(given[name].shape)}, not {list(tensor.shape)}."
            )
        if tensor.numel():
            one, other = tensor.double().cpu(), given[name].double().cpu()
            worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-6)))
    if not worst <= TOLERANCE:
        raise ValueError(f"The exported file differs from the model on {size}, by {worst:.1e}.")
    count = len(expected["scores"])
    return f"The same {count} detections on {size}; largest relative difference {worst:.1e}."
