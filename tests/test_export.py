"""Whole detectors are exported by the command, and the files give what the models give.

Mutations tried by hand; each makes at least one test here fail: sizes fixed in the
ONNX file; outputs under each other's names; a difference of 1% accepted; cells of padding found by
their -inf after pooling, which onnxruntime does not always give.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from detectron2.modeling import build_model
from PIL import Image
from run_detectron2_tests import FILES, compare, passed
from tiny_models import wake

from nonlocal_det import export
from nonlocal_det.cli.export import main
from nonlocal_det.config import load_config
from nonlocal_det.data.lamps.generator import render_image

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).resolve().parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco"
CONFIG = str(ROOT / "configs/lamps_mask_rcnn_R18_NL.yaml")
OPTIONS = [
    *("MODEL.NONLOCAL.PAIRWISE", "embedded_gaussian", "MODEL.NONLOCAL.SCALE", True),
    *("MODEL.NONLOCAL.SUBSAMPLE", True, "TEST.DETECTIONS_PER_IMAGE", 5),
    *("MODEL.NONLOCAL.POSITIONS", ("res3[0]", "res4[-2]", "p3", "p4 NORM=GN", "mask_head[0]")),
]
WAYS = (("torchscript", "tracing"), ("torchscript", "scripting"), ("onnx", "tracing"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights whose blocks add something."""
    torch.manual_seed(0)
    model = build_model(load_config(CONFIG, OPTIONS))
    for module in model.backbone.modules():
        # Statistics that fit no data would let features, and rounding with them, grow.
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(0.5)
    wake(model)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def command(image, output, weights, way, options=OPTIONS):
    arguments = ["--config-file", CONFIG, "--format", way[0], "--export-method", way[1]]
    arguments += ["--sample-image", str(image), "--output", str(output)]
    main([*arguments, "MODEL.WEIGHTS", weights, *map(str, options)])


@pytest.fixture
def lamps(tmp_path):
    path = tmp_path / "lamps.png"
    Image.fromarray(render_image(np.random.default_rng(0))[0]).save(path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_an_exported_file_predicts_the_same(way, weights, lamps, tmp_path, capsys):
    if way[0] == "onnx":
        pytest.importorskip("onnxruntime")
    command(lamps, tmp_path / "out", weights, way)
    said = [line for line in capsys.readouterr().out.splitlines() if "detections on" in line]
    assert len(said) == 2 and all(line.startswith("The same 5 detections") for line in said)
    assert (tmp_path / "out" / export.FORMATS[way[0]]).is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not COCO.exists(), reason="needs some COCO 2017 in ../shared/data/coco")
@pytest.mark.parametrize("way", (WAYS[0], WAYS[2]), ids="-".join)
def test_real_images(way, weights, tmp_path):
    paths = sorted(COCO.glob("*2017/*.jpg"))
    cfg = load_config(CONFIG, [*OPTIONS, "MODEL.WEIGHTS", weights])
    model, path = (
        export.load_model(cfg),
        str(tmp_path / f"model.{'onnx' if way[0] == 'onnx' else 'ts'}"),
    )
    first, *others = [export.load_sample(cfg, str(file)) for file in paths[:3]]
    exported = export.export(model, first, way[1], path)
    for image in (first, *others):
        said = export.compare_outputs(export.detections(model, image), exported(image), image)
        assert said.startswith("The same 5 detections")


def test_a_difference_is_an_error():
    compare, image = export.compare_outputs, torch.zeros(3, 4, 5)
    found = {"pred_boxes": torch.tensor([[0.0, 1.0, 2.0, 100.0]]), "scores": torch.tensor([0.5])}
    assert "same 1 detections on 4 x 5 pixels" in compare(found, found, image)
    with pytest.raises(ValueError, match="differs from the model on 4 x 5 pixels, by 1.0e-02"):
        compare(found, {**found, "pred_boxes": found["pred_boxes"] * 0.99}, image)
    with pytest.raises(ValueError, match=r"scores has the shape \[0\], not \[1\]"):
        compare(found, {**found, "scores": torch.zeros(0)}, image)


BAD = {  # (format and method, options, what the message must say)
    "onnx scripted": (("onnx", "scripting"), [], ["ONNX is exported by tracing"]),
    "no detections": (
        WAYS[0],
        ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.NONLOCAL.POSITIONS", "()"],
        ["A SemanticSegmentor cannot be exported", "GeneralizedRCNN and RetinaNet"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_exported_is_one_sentence(case, lamps, tmp_path):
    way, options, said = BAD[case]
    with pytest.raises(SystemExit) as caught:
        command(lamps, tmp_path / "out", "", way, options)
    assert all(part in str(caught.value) for part in said) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_image_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="nowhere.png"):
        command(tmp_path / "nowhere.png", tmp_path / "out", "", WAYS[0])


@pytest.mark.slow
def test_detectron2s_own_tests():
    source = os.environ.get("DETECTRON2_SOURCE")
    if not source:
        pytest.skip("DETECTRON2_SOURCE names no checkout of detectron2")
    # The other files take an hour: python tests/run_detectron2_tests.py
    stock, ours = compare(Path(source), FILES[:1])
    assert passed(stock) and passed(stock) <= passed(ours)
    assert passed(stock) <= set(ours["ours"])
