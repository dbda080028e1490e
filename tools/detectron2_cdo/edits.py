"""The edits that let detectron2 0.5's Python sources run with today's torch, numpy and Pillow.

Each names a file of the source distribution, the text to replace, what replaces it, and how often
the text occurs. All of them must match before any file is written: sources that differ from the
ones these edits were made for are refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class EditError(Exception):
    """The sources are not the ones that the edits were made for."""


class Edit(NamedTuple):
    """Replace ``old`` by ``new``, ``count`` times, in the file ``path``."""

    path: str
    old: str
    new: str
    count: int = 1


# numpy 1.24 removed its aliases of Python's own types.
NUMPY = (
    Edit("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n"),
    Edit("detectron2/data/build.py", "dtype=np.int)", "dtype=int)"),
    Edit("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    Edit("detectron2/evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)", 2),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)", 2),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", "astype(np.float)", "astype(float)", 3),
    Edit("detectron2/structures/masks.py", "astype(np.bool)", "astype(bool)"),
    Edit("detectron2/structures/masks.py", "dtype=np.bool)", "dtype=bool)"),
    Edit("detectron2/utils/visualizer.py", "astype(np.bool)", "astype(bool)", 3),
    Edit("detectron2/utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
)

# Pillow 10 removed Image.LINEAR, an old name of Image.BILINEAR.
PILLOW = (Edit("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),)

# setuptools 82 removed pkg_resources.
MODEL_ZOO = (
    Edit("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Edit(
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", '
        'os.path.join("configs", config_path)\n    )',
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
    ),
)

# Newer torch asks for the index order of meshgrid by name, and warns on every run without it.
MESHGRID = (
    Edit(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
    Edit(
        "projects/Panoptic-DeepLab/panoptic_deeplab/post_processing.py",
        "torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n    )",
        "torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n"
        '        indexing="ij",\n    )',
    ),
)

# The fast COCO evaluation is compiled; pycocotools' own gives the same numbers.
COCO_EVALUATION = (
    Edit(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "",
    ),
    Edit(
        "detectron2/evaluation/coco_evaluation.py",
        "self._use_fast_impl = use_fast_impl\n",
        "self._use_fast_impl = False  # the fast one is compiled, which this installation is not\n",
    ),
    Edit(
        "detectron2/evaluation/coco_evaluation.py",
        "(COCOeval_opt if use_fast_impl else COCOeval)(coco_gt",
        "COCOeval(coco_gt",
    ),
)

# caffe2 is gone from torch; TorchScript and ONNX export do without it.
EXPORT = (
    Edit(
        "detectron2/export/__init__.py",
        "from .api import *\n",
        "try:\n    from .api import *\nexcept ImportError:  # caffe2, which torch no longer has\n"
        "    pass\n",
    ),
)

# No C++ sources to build, the model zoo's files where this distribution keeps them, and
# requirements as they are: no caffe2 helpers, no version that today's packages have left behind.
PACKAGING = (
    Edit(
        "setup.py",
        "import torch\nfrom torch.utils.cpp_extension import CUDA_HOME, CppExtension, "
        "CUDAExtension\n",
        "",
    ),
    Edit(
        "setup.py",
        'torch_ver = [int(x) for x in torch.__version__.split(".")[:2]]\n'
        'assert torch_ver >= [1, 7], "Requires PyTorch >= 1.7"\n',
        "",
    ),
    Edit("setup.py", "    ext_modules=get_extensions(),\n", ""),
    Edit("setup.py", '    cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},\n', ""),
    Edit("setup.py", "get_model_zoo_configs()}", '["configs/**/*.yaml", "configs/**/*.py"]}'),
    Edit("setup.py", '"iopath>=0.1.7,<0.1.10"', '"iopath>=0.1.7"'),
    Edit("setup.py", '        "future",  # used by caffe2\n', ""),
    Edit("setup.py", '        "pydot",  # used to save caffe2 SVGs\n', ""),
    Edit("setup.py", '        "black==21.4b2",\n', ""),
)

EDITS = NUMPY + PILLOW + MODEL_ZOO + MESHGRID + COCO_EVALUATION + EXPORT + PACKAGING


def apply_edits(root: Path, edits: Sequence[Edit] = EDITS) -> None:
    """Apply ``edits`` below ``root``: every one of them, or none and an ``EditError``."""
    texts: dict[str, str] = {}
    for edit in edits:
        text = texts.get(edit.path)
        texts[edit.path] = _apply(_read(root / edit.path) if text is None else text, edit)
    for path, text in texts.items():
        (root / path).write_text(text, encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise EditError(f"cannot read {path}, a file to edit: {error}") from error


def _apply(text: str, edit: Edit) -> str:
    found = text.count(edit.old)
    if found != edit.count:
        raise EditError(
            f"{edit.path}: expected {edit.old!r} {edit.count} times, found it {found} times"
        )
    return text.replace(edit.old, edit.new)
