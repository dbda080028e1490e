"""LazyConfigs, and backbones other than a ResNet.

Mutations tried by hand; each makes at least one test here fail: a second block that silently
replaces one after the same output; the index of an output ignored; wrapping a builder that takes
blocks itself; a lazy layout other than its YAML's.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from tiny_models import (
    assert_same,
    blocks_of,
    images,
    losses,
    names_without_blocks,
    outputs,
    wake,
    zoo_config,
)
from tiny_training import write_short_lamps
from tool_process import run_tool

from nonlocal_det import PositionError
from nonlocal_det.config import load_config
from nonlocal_det.modeling import insert_after_outputs, nonlocal_block_factory

ROOT = Path(__file__).resolve().parent.parent
LAZY = sorted((ROOT / "configs" / "lazy").glob("*.py"))


def tiny_lazy(path):
    """A LazyConfig's model, narrow, with few samples and with anchors for every level."""
    model = LazyConfig.load(str(path)).model
    model.backbone.out_channels = 32
    model.proposal_generator.head.in_channels = 32
    model.proposal_generator.batch_size_per_image = 4096
    model.proposal_generator.pre_nms_topk = model.proposal_generator.post_nms_topk = (8, 8)
    heads = model.roi_heads
    heads.batch_size_per_image = 8
    heads.box_head.fc_dims = [32]
    heads.box_predictor.update(test_score_thresh=0.0, test_topk_per_image=4)
    heads.box_predictor.input_shape = ShapeSpec(channels=32)
    for name in ("box_head", "mask_head", "keypoint_head"):
        if name in heads:
            shape = heads[name].input_shape
            heads[name].input_shape = ShapeSpec(channels=32, height=shape.height, width=shape.width)
    if "mask_head" in heads:
        heads.mask_head.conv_dims = [32, 32]
    return model


def without_blocks(model):
    """The same LazyConfig, of detectron2's own classes."""
    model = copy.deepcopy(model)
    bottom_up = model.backbone.bottom_up
    if "backbone" in bottom_up:
        model.backbone.bottom_up = bottom_up.backbone
    else:
        bottom_up._target_ = "detectron2.modeling.ResNet"
        del bottom_up.positions, bottom_up.make_block
    head = model.roi_heads.get("keypoint_head")
    if head is not None:
        head._target_ = "detectron2.modeling.roi_heads.KRCNNConvDeconvUpsampleHead"
        del head.positions, head.make_block
    return model


def yaml_positions(path):
    cfg = load_config(str(ROOT / "configs" / f"{path.stem}.yaml"))
    return [position.split()[0] for position in cfg.MODEL.NONLOCAL.POSITIONS]


@pytest.mark.slow
@pytest.mark.parametrize("path", LAZY, ids=lambda path: path.stem)
def test_lazy_configuration(path):
    config = tiny_lazy(path)
    torch.manual_seed(0)
    stock = instantiate(without_blocks(config)).eval()
    for module in stock.modules():
        if type(module).__name__ == "FrozenBatchNorm2d":
            module.weight.mul_(0.5)
    model = instantiate(config).eval()
    model.load_state_dict(stock.state_dict(), strict=False)
    assert names_without_blocks(model) == list(stock.state_dict())

    cfg = zoo_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = config.roi_heads.num_classes
    inputs = images(cfg, (64, 64))
    expected = outputs(stock, inputs)
    assert_same(outputs(model, inputs), expected)
    losses(model, inputs)
    for name, block in blocks_of(model).items():
        assert block.out.weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "path", [path for path in LAZY if "regnet" not in path.stem], ids=lambda path: path.stem
)
def test_lazy_configuration_is_its_yaml(path):
    model = LazyConfig.load(str(path)).model
    resnet, head = model.backbone.bottom_up, model.roi_heads.get("keypoint_head", {})
    assert [*head.get("positions", []), *resnet.positions] == yaml_positions(path)
    common = load_config(str(ROOT / "configs" / f"{path.stem}.yaml")).MODEL
    assert resnet.stages.depth == common.RESNETS.DEPTH
    given = {k: v for k, v in resnet.make_block.items() if k != "_target_"}
    # The keypoint head has settings of its own.
    assert head or given == {key: common.NONLOCAL[key.upper()] for key in given}


def lazy_train(datasets, *arguments, fails=False):
    env = {"DETECTRON2_DATASETS": str(datasets)}
    return run_tool("lazyconfig_train_net", *arguments, env=env, fails=fails)


CONFIG = ("--config-file", ROOT / "configs" / "lazy" / "mask_rcnn_R50_NL.py")
SHORT = (
    *("dataloader.train.dataset.names=lamps_train", "dataloader.test.dataset.names=lamps_val"),
    *("dataloader.train.total_batch_size=1", "dataloader.train.num_workers=0"),
    *("dataloader.train.mapper.augmentations.0.short_edge_length=[64]", "train.max_iter=2"),
    *("dataloader.test.mapper.augmentations.0.short_edge_length=32", "train.eval_period=0"),
    *("dataloader.test.num_workers=0", "train.init_checkpoint=''", "model.roi_heads.num_classes=3"),
    *(
        "model.roi_heads.box_head.fc_dims=[16,1024]",
        "model.roi_heads.box_predictor.test_topk_per_image=1",
    ),
    *("model.proposal_generator.post_nms_topk=[20,10]", "optimizer.lr=0.0001"),
)


@pytest.mark.slow
def test_training_resuming_and_evaluation(tmp_path):
    write_short_lamps(tmp_path)
    output = f"train.output_dir={tmp_path / 'output'}"
    done = lazy_train(tmp_path, *CONFIG, *SHORT, output)
    assert "No GPU was found: this runs on the CPU." in done.stdout or torch.cuda.is_available()
    assert {"config.yaml", "model_final.pth"} <= {p.name for p in (tmp_path / "output").iterdir()}
    done = lazy_train(tmp_path, "--resume", *CONFIG, *SHORT, "train.max_iter=3", output)
    assert "Starting training from iteration 2" in done.stdout
    weights = f"train.init_checkpoint={tmp_path / 'output' / 'model_final.pth'}"
    done = lazy_train(tmp_path, "--eval-only", *CONFIG, *SHORT, output, weights)
    assert "; no new block." in done.stdout and "copypaste: Task: bbox" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("split", "flags"), [("train", ()), ("val", ("--eval-only",))])
def test_an_image_that_cannot_be_loaded_is_named(split, flags, tmp_path):
    write_short_lamps(tmp_path)
    for path in (tmp_path / "lamps" / split).iterdir():
        path.write_bytes(path.read_bytes()[:200])
    output = f"train.output_dir={tmp_path / 'output'}"
    weights = f"train.init_checkpoint={tmp_path / 'model.pth'}"
    if flags:
        config = LazyConfig.apply_overrides(LazyConfig.load(str(CONFIG[1])), list(SHORT))
        torch.save(instantiate(config.model).state_dict(), tmp_path / "model.pth")
    overrides = (output, weights) if flags else (output,)
    done = lazy_train(tmp_path, *flags, *CONFIG, *SHORT, *overrides, fails=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lazyconfig_train_net.py: error: ") and "truncated" in last
    assert f"/lamps/{split}/0" in last and ("stopped at iteration 0" in last) == (not flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config-file", "no_such.py"), ["'no_such.py'"]),
        ((*CONFIG, *SHORT, "train.max_iter"), ["'train.max_iter'", "KEY=VALUE"]),
        (
            (*CONFIG, *SHORT, "dataloader.test.dataset.names=lamps_tst"),
            ["'lamps_tst'", "lamps_train"],
        ),
        (CONFIG, ["coco_2017_train", "DETECTRON2_DATASETS"]),
    ],
)
def test_bad_input_exits_with_a_one_line_error(arguments, said, tmp_path):
    done = lazy_train(tmp_path, *arguments, f"train.output_dir={tmp_path / 'output'}", fails=True)
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr.strip().splitlines()[-1] for part in said)
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_a_bad_position_exits_with_a_one_line_error(tmp_path):
    output = f"train.output_dir={tmp_path / 'output'}"
    wrong = "model.backbone.bottom_up.positions=['res4[9]']"
    done = lazy_train(tmp_path, *CONFIG, *SHORT, output, wrong, fails=True)
    assert "Traceback" not in done.stderr and "'res4[9]'" in done.stderr.strip().splitlines()[-1]


def small_regnet():
    return RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=5,
        w_a=8,
        w_0=8,
        w_m=2,
        group_width=8,
        norm="BN",
        out_features=["s1", "s2", "s3"],
    )


def resnet_pyramid():
    """detectron2's pyramid of a plain backbone, which ViTDet has; on official main only."""
    vit = pytest.importorskip("detectron2.modeling.backbone.vit", reason="needs official main")
    return vit.SimpleFeaturePyramid(small_regnet(), "s3", 16, [2.0, 1.0, 0.5], LastLevelMaxPool())


OTHERS = {"RegNet": (small_regnet, ["s1", "s3"]), "ViTDet": (resnet_pyramid, ["p3", "p6"])}


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_after_the_outputs_of_any_backbone(name):
    build, positions = OTHERS[name]
    torch.manual_seed(0)
    stock = build().eval()
    model = copy.deepcopy(stock)
    assert insert_after_outputs(model, positions, nonlocal_block_factory(norm="")) is model
    assert names_without_blocks(model) == list(stock.state_dict())
    assert list(blocks_of(model)) == [f"non_local.{name}" for name in positions]
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = stock(image)
        assert_same(model(image), expected)
        wake(model)
        changed = {k for k, v in model(image).items() if not torch.equal(v, expected[k])}
        # A block changes its own output and no other.
        assert changed == set(positions)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(other(image), model(image))
    sum(output.sum() for output in model(image).values()).backward()
    assert all(
        p.grad is not None for block in blocks_of(model).values() for p in block.parameters()
    )


@pytest.mark.parametrize(
    ("position", "said"),
    [("s4", "the outputs of RegNet are s1, s2, s3"), ("s3[0]", "without an index")],
)
def test_an_output_that_is_not_there(position, said):
    with pytest.raises(PositionError, match=said):
        insert_after_outputs(small_regnet(), [position])
    with pytest.raises(PositionError, match="second block after s1"):
        insert_after_outputs(small_regnet(), ["s1", "s1"])
    model = insert_after_outputs(small_regnet(), ["s1"])
    with pytest.raises(PositionError, match="second block after s1"):
        insert_after_outputs(model, ["s1"])


@pytest.fixture
def registered():
    """A backbone that is not detectron2's, in its registry."""

    def build_regnet_fpn_for_test(cfg, input_shape):
        return FPN(small_regnet(), ["s1", "s2", "s3"], 32, top_block=TopOfP4())

    BACKBONE_REGISTRY.register(build_regnet_fpn_for_test)
    yield build_regnet_fpn_for_test.__name__
    del BACKBONE_REGISTRY._obj_map[build_regnet_fpn_for_test.__name__]


class TopOfP4(LastLevelMaxPool):
    def __init__(self):
        super().__init__()
        self.in_feature = "p4"


def wrapping(backbone, *positions):
    cfg = zoo_config(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5"], "MODEL.NONLOCAL.NORM", ""]
        + ["MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256]]]
        + ["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"]],
    )
    cfg.MODEL.BACKBONE.NAME = "build_nonlocal_backbone"
    cfg.MODEL.NONLOCAL.WRAPPED_BACKBONE = backbone
    cfg.MODEL.NONLOCAL.POSITIONS = positions
    return cfg


def test_a_registered_backbone_takes_blocks_by_configuration(registered):
    cfg = wrapping(registered, "p2", "p5 PAIRWISE=dot_product")
    model = build_model(cfg)
    assert list(blocks_of(model)) == ["backbone.non_local.p2", "backbone.non_local.p5"]
    assert model.backbone.non_local.p5.pairwise == "dot_product"
    cfg.MODEL.BACKBONE.NAME = registered
    stock = build_model(cfg).eval()
    assert names_without_blocks(model) == list(stock.state_dict())
    model.eval().load_state_dict(stock.state_dict(), strict=False)
    inputs = images(cfg, (64, 64))
    assert_same(outputs(model, inputs), outputs(stock, inputs))
    losses(model, inputs)
    for name, block in blocks_of(model).items():
        assert block.out.weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("backbone", "position", "said"),
    [
        (None, "p6", "'p6'.*This model takes blocks at p2, p3, p4, p5"),
        (None, "s1", "'s1'.*no such position"),
        (None, "mask_head[0]", "'mask_head.0.'.*NonLocalMaskRCNNConvUpsampleHead does"),
        ("", "p2", "WRAPPED_BACKBONE is '', which is not a registered.*build_resnet_backbone"),
        ("build_nonlocal_resnet_fpn_backbone", "p2", "takes blocks itself"),
        ("build_nonlocal_backbone", "p2", "takes blocks itself"),
    ],
)
def test_what_cannot_be_wrapped(backbone, position, said, registered):
    with pytest.raises(PositionError, match=said):
        build_model(wrapping(registered if backbone is None else backbone, position))
