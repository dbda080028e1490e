#!/usr/bin/env python
"""Export a detector to TorchScript or ONNX, and see that the file gives what the model gives.

python tools/export_model.py --config-file configs/mask_rcnn_R50_NL.yaml --format onnx \
    --sample-image picture.jpg --output output/export MODEL.WEIGHTS output/model_final.pth

The flags are those of detectron2's tools/deploy/export_model.py. What is exported takes an image
(3, H, W) of any size, float32 in the channel order of INPUT.FORMAT, and gives one image's
detections before they are pasted and rescaled: boxes in its pixels, and masks of 28 x 28.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import GeneralizedRCNN, RetinaNet, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from nonlocal_det.checkpoint.detection_checkpoint import NonLocalCheckpointer
from nonlocal_det.config import load_config
from nonlocal_det.engine import check_dataset_registered
from nonlocal_det.engine.preflight import check_inference_cfg
from nonlocal_det.errors import exit_on_error
from nonlocal_det.modeling.supported_positions import check_positions
from nonlocal_det.utils.file_io import ensure_writable_dir

Detections = dict[str, Tensor]
Exported = Callable[[Tensor], Detections]

OPSET = 17
# What may be a detection's; TorchScript has to know it beforehand.
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
TOLERANCE = 1e-3  # of the largest number of each output


def main(argv: list[str] | None = None) -> None:
    """Export as the arguments say; ends with one sentence where that is not possible."""
    args = parse(argv)
    setup_logger()
    with exit_on_error():
        if (args.format, args.export_method) == ("onnx", "scripting"):
            raise ValueError("ONNX is exported by tracing: use --export-method tracing.")
        cfg = configuration(args)
        image = sample(cfg, args.sample_image)
        model = load(cfg)
        ensure_writable_dir(args.output)
        path = os.path.join(args.output, "model.onnx" if args.format == "onnx" else "model.ts")
        exported = export(model, image, args.export_method, path)
        print(f"Wrote {path}.")
        for other in (image, another_size(image)):
            print(compare(detections(model, other), exported(other), other))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """detectron2's own flags."""
    parser = argparse.ArgumentParser(description="Export a model for deployment.")
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--format", choices=("torchscript", "onnx"), default="torchscript")
    parser.add_argument("--export-method", choices=("tracing", "scripting"), default="tracing")
    parser.add_argument(
        "--sample-image", metavar="FILE", help="default: the first of DATASETS.TEST"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs over the file's")
    return parser.parse_args(argv)


def configuration(args: argparse.Namespace) -> CfgNode:
    """The configuration, on the CPU where there is no GPU."""
    cfg = load_config(args.config_file, args.opts)
    check_positions(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_inference_cfg(cfg)
    cfg.freeze()
    return cfg


def load(cfg: CfgNode) -> nn.Module:
    """The model with its weights, in evaluation mode."""
    model = build_model(cfg).eval()
    if not isinstance(model, (GeneralizedRCNN, RetinaNet)):
        raise ValueError(
            f"A {type(model).__name__} cannot be exported: detectron2 exports GeneralizedRCNN and "
            f"RetinaNet, whose results are detections."
        )
    NonLocalCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def sample(cfg: CfgNode, path: str | None) -> Tensor:
    """A picture (3, H, W), float32, resized as in testing."""
    if path is None:
        check_dataset_registered(cfg.DATASETS.TEST[0])
        path = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]["file_name"]
    picture = read_image(path, format=cfg.INPUT.FORMAT)
    shortest = cfg.INPUT.MIN_SIZE_TEST
    resize = T.ResizeShortestEdge([shortest, shortest], cfg.INPUT.MAX_SIZE_TEST)
    resized = resize.get_transform(picture).apply_image(picture)
    return torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))


def another_size(image: Tensor) -> Tensor:
    """The picture on its side, smaller."""
    return nn.functional.interpolate(image.mT[None], scale_factor=0.7, mode="bilinear")[0]


def detections(model: nn.Module, image: Tensor) -> Detections:
    """What the model itself finds in a picture."""
    with torch.no_grad():
        return fields(infer(model, [{"image": image}])[0]["instances"])


def infer(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[dict[str, Instances]]:
    """detectron2's output, without pasting masks where the model can leave it out."""
    if isinstance(model, GeneralizedRCNN):
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]
    return model(inputs)


def fields(instances: Instances) -> Detections:
    """Tensors by name, in the order in which `TracingAdapter` has them."""
    found = instances.get_fields()
    return {name: getattr(found[name], "tensor", found[name]) for name in sorted(found)}


def export(model: nn.Module, image: Tensor, method: str, path: str) -> Exported:
    """Write the file, and give a function that runs it.

    Raises:
        ValueError: if detectron2 or PyTorch cannot export this model.
    """
    trace = to_onnx if path.endswith(".onnx") else to_traced
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, on what a trace takes for constant
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
    """The model with tensors only, in and out, and the names of its outputs."""
    adapter = TracingAdapter(model, [{"image": image}], infer).eval()
    return adapter, list(detections(model, image))


class Scriptable(nn.Module):
    """A model that gives dictionaries: PyTorch cannot save one that gives `Instances`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class ScriptableRCNN(Scriptable):
    """Of a GeneralizedRCNN."""

    def forward(self, inputs: tuple[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A batch in, each image's detections out."""
        return [i.get_fields() for i in self.model.inference(inputs, do_postprocess=False)]


class ScriptableRetinaNet(Scriptable):
    """Of a RetinaNet."""

    def forward(self, inputs: tuple[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A batch in, each image's detections out."""
        return [i.get_fields() for i in self.model(inputs)]


def to_scripted(model: nn.Module, path: str) -> Exported:
    """TorchScript by scripting: batches of any number of images, each of any size."""
    adapter = ScriptableRCNN if isinstance(model, GeneralizedRCNN) else ScriptableRetinaNet
    scripting_with_instances(adapter(model).eval(), FIELDS).save(path)
    scripted = torch.jit.load(path)

    def run(image: Tensor) -> Detections:
        return dict(sorted(scripted(({"image": image},))[0].items()))

    return run


def compare(expected: Detections, given: Detections, image: Tensor) -> str:
    """One line on the differences of two results for a picture.

    Raises:
        ValueError: if they differ in more than rounding.
    """
    size = f"{image.shape[2]} x {image.shape[1]} pixels"
    worst = 0.0
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise ValueError(
                f"What was exported differs from the model on {size}: {name} has the shape "
                f"{list(given[name].shape)}, not {list(tensor.shape)}."
            )
        if tensor.numel():
            one, other = tensor.double().cpu(), given[name].double().cpu()
            worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1e-6)))
    if not worst <= TOLERANCE:
        raise ValueError(f"What was exported differs from the model on {size}, by {worst:.1e}.")
    count = len(expected["scores"])
    return f"The same {count} detections on {size}; largest relative difference {worst:.1e}."


if __name__ == "__main__":
    main()
