"""Every shipped configuration builds a model, equal to the stock one until its blocks learn.

Mutations tried by hand; each makes at least one test here fail:
R101's five blocks at a step of 6; REDUCTION ignored; the keypoint head's blocks before their
ReLUs; a wrong position in the documentation's table; a softmax of unscaled products.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from tiny_models import (
    FEW,
    assert_same,
    blocks_of,
    build_pair,
    images,
    losses,
    names_without_blocks,
    outputs,
    wake,
)

from nonlocal_det.benchmark.flops import build_for_analysis
from nonlocal_det.benchmark.initial_attention import initial_attention
from nonlocal_det.checkpoint.detection_checkpoint import NonLocalCheckpointer
from nonlocal_det.config import load_config
from nonlocal_det.layers import MECHANISMS

ROOT = Path(__file__).resolve().parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco"
CONFIGS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("Base-")
)
# The names of the blocks, which tell the layers that they follow, for comparison with the paper.
RES4 = "backbone.bottom_up.res4.nl"
BLOCKS = {
    "mask_rcnn_R50_NL": [f"{RES4}4"],
    "mask_rcnn_R101_NL": [f"{RES4}21"],
    "mask_rcnn_X152_NL": [f"{RES4}34"],
    "mask_rcnn_R50_NL5": [
        *(f"backbone.bottom_up.res3.nl{i}" for i in (1, 3)),
        *(f"{RES4}{i}" for i in (1, 3, 5)),
    ],
    "mask_rcnn_R50_NL10": [
        *(f"backbone.bottom_up.res3.nl{i}" for i in range(4)),
        *(f"{RES4}{i}" for i in range(6)),
    ],
    "mask_rcnn_R101_NL5": [
        *(f"backbone.bottom_up.res3.nl{i}" for i in (1, 3)),
        *(f"{RES4}{i}" for i in (6, 13, 20)),
    ],
    "keypoint_rcnn_R101_headNL4": [
        f"roi_heads.keypoint_head.nl_conv_fcn_relu{i}" for i in (2, 4, 6, 8)
    ],
    "mask_rcnn_R50_DNL_c4c5": [
        f"{RES4}4",
        *(f"backbone.bottom_up.res5.nl{i}" for i in (0, 1, 2)),
    ],
    "mask_rcnn_R50_C4_CGNL": ["backbone.res4.nl4"],
}


def tiny_config(name):
    cfg = load_config(str(ROOT / "configs" / f"{name}.yaml"), FEW)
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    if cfg.MODEL.RESNETS.NUM_GROUPS > 1:
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 1
    # SyncBN trains on GPUs only.
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        node.NORM = node.NORM.replace("SyncBN", "naiveSyncBN")
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configuration(name, tmp_path):
    cfg = tiny_config(name)
    stock, model = build_pair(cfg)
    inputs = images(cfg, (64, 64))

    blocks = blocks_of(model)
    assert names_without_blocks(model) == list(stock.state_dict())
    assert blocks and list(blocks) == BLOCKS.get(name, list(blocks))
    settings = cfg.MODEL.NONLOCAL
    for block in blocks.values():
        assert type(block) is MECHANISMS[settings.MECHANISM]
        assert block.inner_channels == block.channels // settings.REDUCTION
        assert getattr(block, "pairwise", settings.PAIRWISE) == settings.PAIRWISE

    assert_same(outputs(model, inputs), outputs(stock, inputs))
    del stock

    losses(model, inputs)
    for block_name, block in blocks.items():
        zero = getattr(block.norm, "weight", block.out.weight)
        assert zero.grad.abs().sum() > 0, block_name

    wake(model)
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    torch.manual_seed(4)
    fresh = build_model(cfg).eval()
    NonLocalCheckpointer(fresh).load(str(tmp_path / "model.pth"))
    assert_same(outputs(fresh, inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_datasets_are_known(name):
    cfg = load_config(str(ROOT / "configs" / f"{name}.yaml"))
    depth = f"-{cfg.MODEL.RESNETS.DEPTH}"
    assert not cfg.MODEL.WEIGHTS or depth in cfg.MODEL.WEIGHTS
    assert ("keypoints" in cfg.DATASETS.TRAIN[0]) == cfg.MODEL.KEYPOINT_ON


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_only_bases_stand_alone(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert path.name.startswith("Base-") or re.search(r'^_BASE_: ".+\.yaml"$', text, re.MULTILINE)


def test_the_table_lists_every_configuration():
    rows = re.findall(r"^\| \[`(\w+)`\].*?\| (.*?) \|", (ROOT / "docs/models.md").read_text(), re.M)
    positions = {
        name: load_config(str(ROOT / "configs" / f"{name}.yaml")).MODEL.NONLOCAL.POSITIONS
        for name in CONFIGS
    }
    # The settings of a position are in the configuration only.
    assert {name: text.replace("`", "") for name, text in rows} == {
        name: ", ".join(position.split()[0] for position in given)
        for name, given in positions.items()
    }


# With a softmax; deeper models have the same blocks.
STARTS = [
    name
    for name in CONFIGS
    if "R50" in name and not any(form in name for form in ("CGNL", "dot_product", "concatenation"))
]


@pytest.mark.slow
@pytest.mark.skipif(not COCO.exists(), reason="needs some COCO 2017 in ../shared/data/coco")
@pytest.mark.parametrize("name", STARTS)
def test_blocks_start_with_a_softmax_that_can_learn(name):
    """On a real image: neither saturated, nor is the gradient of theta and phi negligible."""
    torch.manual_seed(0)
    model = build_for_analysis(str(ROOT / "configs" / f"{name}.yaml"), list(map(str, FEW)))
    inputs = {}

    def keep(block, args, output):
        inputs[block] = args[0]

    blocks = blocks_of(model)
    for block in blocks.values():
        block.register_forward_hook(keep)
    image = next((COCO / "val2017").glob("*.jpg"))
    found = initial_attention(model, "", str(image), (192, 288))
    assert sorted(found) == sorted(blocks)
    for block_name, health in found.items():
        assert health.entropy > 0.1 and health.max_weight < 0.9, block_name
        block, x = blocks[block_name], inputs[blocks[block_name]].detach()
        wake(block)
        z = block(x)
        (z * torch.randn_like(z)).sum().backward()
        queries, keys = ("theta", "phi") if hasattr(block, "phi") else ("w_k", "w_k")
        if hasattr(block, queries):
            values = block.get_submodule("g" if hasattr(block, "g") else "w_v1")
            for part in (queries, keys):
                assert slope(block.get_submodule(part)) > 0.01 * slope(values), (block_name, part)


def slope(convolution):
    """Size of a convolution's gradient, relative to that of its weights."""
    weight = convolution.weight
    return (weight.grad.norm() / weight.norm()).item()
