"""Run detectron2's own tests twice: as they are, and with our backbones in place of the stock ones.

    python tests/run_detectron2_tests.py DETECTRON2 [--active] [--files FILE ...]

DETECTRON2 is a checkout of the version installed. In the second run every builder and class that
makes a ResNet or an FPN, by registry, import or LazyConfig, gives one of ours with the weights of
the stock one and new blocks at ``POSITIONS``; with ``--active``, blocks that add something. (Then
eager and scripted blocks choose different kernels when they learn, and results differ by rounding,
which some of the tests do not allow.) The exit code is 1 if a test passes for the stock one only.

What the tests would download is made here, the same for both runs: weights of the stock model's
names and shapes, and an image. And ONNX is exported by the exporter that the tests were written
for, no longer PyTorch's default. This file is also the plugin for pytest that does all this.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = (
    "tests/modeling/test_backbone.py",
    "tests/modeling/test_model_e2e.py",
    "tests/test_export_torchscript.py",
    "tests/test_export_onnx.py",
)
POSITIONS = ("res4[-2]", "p3")
ZOO, IMAGES = "https://dl.fbaipublicfiles.com/detectron2/", "http://images.cocodataset.org/"
# Environment variables of the plugin.
MODE, FOLDER = "DETECTRON2_TESTS_MODE", "DETECTRON2_TESTS_FOLDER"

outcomes: dict[str, str] = {}
ours_in: set[str] = set()  # the tests that ran with a backbone of ours


def run(checkout: Path, files, mode: str, folder: Path) -> dict:
    """The outcome of each test, "passed", "failed" or "skipped", and which had our backbone."""
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, MODE: mode, FOLDER: str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "--rootdir", "."]
    command += ["-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    # Copied: a checkout's own detectron2 folder, not compiled, would hide the one installed.
    copied = folder / "checkout"
    if not copied.exists():
        copied.mkdir(parents=True)
        (copied / "tests").symlink_to(checkout / "tests")
    with open(folder / f"{mode}.log", "w", encoding="utf-8") as log:
        subprocess.run(
            [*command, *files],
            cwd=copied,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return json.loads((folder / f"{mode}.json").read_text())


def compare(checkout: Path, files=FILES, mode: str = "new") -> tuple[dict, dict]:
    """The results of both runs, as `run` gives them; ``mode`` is "new" or "active"."""
    folder = Path(tempfile.mkdtemp(prefix="detectron2-tests-"))
    print(f"Logs are in {folder}.")
    return run(checkout, files, "stock", folder), run(checkout, files, mode, folder)


def passed(result: dict) -> set[str]:
    return {test for test, outcome in result["outcomes"].items() if outcome == "passed"}


# The plugin.


def pytest_configure(config):
    if MODE in os.environ:
        _make_downloads_here(Path(os.environ[FOLDER]))
        _export_as_before()
        if os.environ[MODE] != "stock":
            _replace_backbones()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    if MODE in os.environ:
        result = {"outcomes": outcomes, "ours": sorted(ours_in)}
        path = Path(os.environ[FOLDER]) / f"{os.environ[MODE]}.json"
        path.write_text(json.dumps(result))


def _make_downloads_here(folder: Path) -> None:
    from detectron2.utils.file_io import PathManager
    from iopath.common.file_io import PathHandler

    class MadeHere(PathHandler):
        def _get_supported_prefixes(self):
            return [ZOO, IMAGES]

        def _get_local_path(self, path, **_):
            if path.startswith(IMAGES):
                return _image(folder)
            return _weights(folder, path[len(ZOO) :])

    PathManager.register_handler(MadeHere())


def _export_as_before() -> None:
    import torch

    with contextlib.suppress(ImportError):
        import onnx.version  # noqa: F401  Used without being imported.
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)


def _image(folder: Path) -> str:
    import numpy as np
    from PIL import Image

    from nonlocal_det.data import LampsParams, render_image

    path = folder / "image.png"
    size = LampsParams(side=(480, 640), shape_size=(80.0, 200.0))
    Image.fromarray(render_image(np.random.default_rng(0), size)[0]).save(path)
    return str(path)


def _weights(folder: Path, name: str) -> str:
    """Random weights with the names of a model of the zoo, such that it predicts something.

    The first run, which is that of the stock models, makes them; the second takes the same.
    """
    import torch
    from detectron2 import model_zoo
    from detectron2.layers import FrozenBatchNorm2d
    from detectron2.modeling import build_model

    path = folder / f"{name.replace('/', '_')}.pth"
    if not path.exists():
        cfg = model_zoo.get_config("/".join(name.split("/")[:2]) + ".yaml")
        cfg.MODEL.DEVICE = "cpu"
        torch.manual_seed(0)
        model = build_model(cfg)
        for key, module in model.named_modules():
            if isinstance(module, FrozenBatchNorm2d):
                # Statistics that fit no data would let features grow with every residual block.
                module.weight.mul_(0.5)
            elif key.endswith("cls_score"):
                module.weight.data.mul_(100)  # scores that differ
        torch.save({"model": model.state_dict()}, path)
    return str(path)


def _replace_backbones() -> None:
    import detectron2.modeling as modeling
    import detectron2.modeling.backbone as backbones
    import detectron2.utils.testing as testing
    from detectron2 import model_zoo
    from detectron2.modeling.backbone import fpn, resnet
    from tiny_models import OURS

    registered = backbones.build.BACKBONE_REGISTRY._obj_map
    for module, name in (
        (resnet, "build_resnet_backbone"),
        (fpn, "build_resnet_fpn_backbone"),
        (fpn, "build_retinanet_resnet_fpn_backbone"),
    ):
        builder = _builder(getattr(module, name), registered[OURS[name]], OURS[name])
        registered[name] = builder
        # Tests also import builders; detectron2's own builders keep those they call.
        for namespace in (module, backbones, modeling):
            if hasattr(namespace, name):
                setattr(namespace, name, builder)
    for namespace in (testing, model_zoo.model_zoo):
        namespace.instantiate = _instantiate


def _builder(stock, ours, name):
    from nonlocal_det import add_nonlocal_config

    def build(cfg, input_shape):
        cfg = cfg.clone()
        cfg.defrost()
        add_nonlocal_config(cfg)
        cfg.MODEL.BACKBONE.NAME = name
        cfg.MODEL.NONLOCAL.POSITIONS = POSITIONS if "fpn" in name else POSITIONS[:1]
        return _with_weights_of(stock(cfg, input_shape), lambda: ours(cfg, input_shape))

    return build


def _instantiate(cfg):
    """A LazyConfig's model, its ResNet-FPN one of ours."""
    from detectron2.config import instantiate

    stock = instantiate(cfg)
    if "bottom_up" in cfg.get("backbone", {}):
        backbone = cfg.backbone
        backbone._target_ = "nonlocal_det.modeling.NonLocalFPN"
        backbone.positions = POSITIONS[1:]
        backbone.bottom_up._target_ = "nonlocal_det.modeling.nonlocal_resnet"
        backbone.bottom_up.positions = POSITIONS[:1]
        stock.backbone = _with_weights_of(stock.backbone, lambda: instantiate(backbone))
    return stock


def _with_weights_of(stock, make):
    """A backbone of ours with the weights of the stock one, sampling no random number."""
    import torch
    from tiny_models import names_without_blocks, wake

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().train(stock.training)
        if os.environ[MODE] == "active":
            wake(model)
    model.load_state_dict(stock.state_dict(), strict=False)
    assert names_without_blocks(model) == list(stock.state_dict())
    ours_in.add(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, metavar="DETECTRON2")
    parser.add_argument("--active", action="store_true", help="blocks that add something")
    parser.add_argument("--files", nargs="+", default=FILES, metavar="FILE")
    arguments = parser.parse_args()
    mode = "active" if arguments.active else "new"
    stock, ours = compare(arguments.checkout.resolve(), arguments.files, mode)
    lost = passed(stock) - passed(ours)
    print(f"{len(passed(stock))} of {len(stock['outcomes'])} pass for the stock backbones.")
    with_ours = len(passed(ours) & set(ours["ours"]))
    print(f"{len(passed(ours))} pass for ours; {with_ours} of these build a backbone.")
    for test in sorted(lost):
        print(f"Lost: {test}")
    for test, outcome in sorted(stock["outcomes"].items()):
        if outcome != "passed":
            print(f"Of the stock ones too: {outcome}: {test}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
