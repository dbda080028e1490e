"""Package `nonlocal_det`: what it is and what it needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version that the package states; read, not imported, for torch may not be here yet."""
    text = (HERE / "nonlocal_det" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(
    name="nonlocal_det",
    version=version(),
    description="Non-local blocks anywhere in a detectron2 detector, by configuration",
    python_requires=">=3.9",
    packages=find_packages(include=["nonlocal_det", "nonlocal_det.*"]),
    package_data={"nonlocal_det": ["py.typed", "attention/*.html"]},
    # Without bounds, for a torch that is there must stay: detectron2 is compiled against it.
    # detectron2 is on no package index under its own name: see tools/install_detectron2.py.
    install_requires=[
        "torch",
        "torchvision",
        "fvcore",
        "numpy",
        "Pillow",
        "opencv-python",
        "matplotlib",
        "pycocotools",
    ],
    extras_require={
        # COCO's measures in C++, for a detectron2 that was not compiled.
        "fast": ["faster-coco-eval"],
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff"),
            *("onnx", "onnxruntime", "onnxscript", "selenium"),
        ],
    },
)
