"""Stands in for detectron2's compiled module where only its Python sources are installed.

detectron2 imports ``detectron2._C`` at start-up, but an axis-aligned detector calls nothing in it:
RoIAlign and NMS come from torchvision. So this module imports, and each operator it should hold
raises an error that says what is missing. The installer copies it to ``detectron2/_C.py``.
"""

from typing import Any, Callable

import torch

# Operators that detectron2 0.5 reaches as attributes of this module.
OPERATORS = (
    "deform_conv_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_filter",
    "modulated_deform_conv_forward",
    "modulated_deform_conv_backward",
    "box_iou_rotated",
    "roi_align_rotated_forward",
    "roi_align_rotated_backward",
    "InstanceAnnotation",
    "COCOevalEvaluateImages",
    "COCOevalAccumulate",
)


def _sentence(operator: str) -> str:
    return (
        f"{operator} needs detectron2's compiled operators, which this installation "
        "(detectron2-cdo 0.5, Python sources only) lacks; install official detectron2 from GitHub: "
        "pip uninstall detectron2-cdo, then "
        "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2"
    )


def _missing(operator: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(_sentence(operator))

    call.__name__ = call.__qualname__ = operator
    return call


globals().update({operator: _missing(operator) for operator in OPERATORS})

# This one is reached as torch.ops.detectron2.nms_rotated; the library object keeps it registered.
_library = torch.library.Library("detectron2", "DEF")
_library.define("nms_rotated(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
_library.impl("nms_rotated", _missing("nms_rotated"), "CompositeExplicitAutograd")


def get_compiler_version() -> str:
    """For ``detectron2.utils.collect_env``: nothing was compiled."""
    return "none (Python sources only)"


def get_cuda_version() -> str:
    """For ``detectron2.utils.collect_env``: nothing was compiled."""
    return "none (Python sources only)"


def has_cuda() -> bool:
    """For ``detectron2.utils.collect_env``: no operator of detectron2's own runs on CUDA."""
    return False


def __getattr__(name: str) -> Any:
    # hasattr() and import machinery rely on AttributeError for anything but an operator.
    raise AttributeError(_sentence(f"detectron2._C.{name}"))
