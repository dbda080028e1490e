"""Every standard model of detectron2, with blocks at all its positions, against the stock model.

Mutations tried by hand; each makes at least one test here fail:
looking for a C4 model's res5 in its backbone; blocks after outputs that never run; the keypoint
head's blocks before their ReLUs; levels that only an unused proposal network reads; stages behind
the last that is read; mask positions with masks off; FrozenBN as a norm; calling a block new if
any of its tensors is; torchvision's norms under their own names.
"""

from __future__ import annotations

import copy
import pickle
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import DeformConv
from detectron2.modeling import build_model
from tiny_models import (
    OURS,
    STOCK,
    assert_same,
    blocks_of,
    build_pair,
    images,
    in_float64,
    losses,
    names_without_blocks,
    outputs,
    renamed,
    wake,
    zoo_config,
)

from nonlocal_det import PositionError
from nonlocal_det.checkpoint.detection_checkpoint import NonLocalCheckpointer
from nonlocal_det.modeling.block_factory import check_batch_norms
from nonlocal_det.modeling.supported_positions import check_positions

pytestmark = pytest.mark.numeric

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RESNET = ("res2[0]", "res3[-1]", "res4[-2]", "res5[::2]")
PYRAMID = ("p2", "p3", "p4", "p5", "p6")
MASK = ("mask_head[1::2]",)
BASIC = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.DEPTH"]
GROUPED = ["MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 1]

# name: (the model zoo's file, options over it, positions)
MODELS = {
    "R18": (MASK_RCNN, [*BASIC, 18], (*RESNET[:1], "res4[-2]", *PYRAMID, *MASK)),
    "R34": (MASK_RCNN, [*BASIC, 34], (*RESNET, *PYRAMID, *MASK)),
    "R50": (MASK_RCNN, [], (*RESNET, *PYRAMID, *MASK)),
    "R101": (MASK_RCNN, ["MODEL.RESNETS.DEPTH", 101], (*RESNET, *MASK)),
    "X101": (
        "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
        GROUPED,
        (*RESNET, *MASK),
    ),
    "X152": (MASK_RCNN, [*GROUPED, "MODEL.RESNETS.DEPTH", 152], (*RESNET, "p2")),
    "C4": ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", [], RESNET),
    "C4-detection": ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", [], RESNET),
    "DC5": ("COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml", [], (*RESNET, *MASK)),
    "RetinaNet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        [],
        (*RESNET, "p3", "p4", "p5", "p6", "p7"),
    ),
    "Cascade": (
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.ROI_BOX_HEAD.NUM_CONV", 2],
        (*RESNET, *PYRAMID, "box_head[:]", *MASK),
    ),
    "keypoint": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1],
        (*RESNET, "box_head[0]", "keypoint_head[1::2]"),
    ),
    "panoptic": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", [], (*RESNET, *PYRAMID)),
    "proposals": ("COCO-Detection/rpn_R_50_FPN_1x.yaml", [], (*RESNET, *PYRAMID)),
    "BN": (
        MASK_RCNN,
        ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.NONLOCAL.NORM", "BN"],
        (*RESNET, "p2", *MASK),
    ),
    "naiveSyncBN": (
        MASK_RCNN,
        ["MODEL.RESNETS.NORM", "naiveSyncBN", "MODEL.NONLOCAL.NORM", "naiveSyncBN"],
        (*RESNET, "p2", *MASK),
    ),
    "GN": (
        MASK_RCNN,
        # 32 groups need 32 channels everywhere.
        ["MODEL.RESNETS.NORM", "GN", "MODEL.NONLOCAL.NORM", "GN"]
        + ["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32],
        (*RESNET, "p2", *MASK),
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """The configuration, detectron2's own model, and ours, of the same weights."""
    path, options, positions = MODELS[request.param]
    # Blocks without a norm unless the model is there for its norm. Embeddings of the default "he"
    # have logits in the thousands at res2 here: a saturated softmax, from which they hardly learn.
    small = ["MODEL.NONLOCAL.NORM", "", "MODEL.NONLOCAL.INIT", "gaussian"]
    cfg = zoo_config(path, [*small, *options])
    cfg.MODEL.NONLOCAL.POSITIONS = positions
    cfg = renamed(cfg, OURS)
    return cfg, *build_pair(cfg)


def test_no_name_but_those_of_blocks_is_new(pair):
    _, stock, model = pair
    assert names_without_blocks(model) == list(stock.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {name for name, p in stock.named_parameters() if p.requires_grad}
    inside = {
        f"{n}.{k}" for n, block in blocks_of(model).items() for k, _ in block.named_parameters()
    }
    assert trained == expected | inside


def test_the_same_seed_gives_the_same_weights_with_and_without_blocks():
    cfg = zoo_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    models = []
    for positions in ((), ("res3[:]", "res4[-2]", "p3", "mask_head[0]")):
        cfg.MODEL.NONLOCAL.POSITIONS = positions
        torch.manual_seed(0)
        models.append(build_model(renamed(cfg, OURS)))
    stock, model = (m.state_dict() for m in models)
    assert len(blocks_of(models[1])) == 7
    assert_same({name: model[name] for name in stock}, stock)
    first, second = (models[1].backbone.bottom_up.get_submodule(f"res3.nl{i}") for i in (0, 1))
    assert not torch.equal(first.theta.weight, second.theta.weight)


def test_there_is_a_block_at_every_position(pair):
    cfg, _, model = pair
    named = " ".join(blocks_of(model))
    for position in check_positions(cfg):
        assert position.target in named or position.target.endswith("_head"), position.text
    heads = sum("head" in position.target for position in check_positions(cfg))
    assert sum("head." in name for name in blocks_of(model)) >= heads


def test_outputs_are_the_stock_models_bit_for_bit(pair):
    cfg, stock, model = pair
    inputs = images(cfg, (64, 96))
    expected = outputs(stock, inputs)
    assert_same(outputs(model, inputs), expected)
    # Nor is that because the blocks are not run.
    awake = copy.deepcopy(model)
    wake(awake)
    given = outputs(awake, inputs)
    assert any(not torch.equal(given[name], tensor) for name, tensor in expected.items())


def test_a_training_step_gives_every_block_a_gradient(pair):
    cfg, stock, model = pair
    # A cell of p7 is 128 pixels wide; the softmax over a single one gives no gradient.
    inputs = images(cfg, (64, 160), (64, 64))
    expected, given = losses(copy.deepcopy(stock), inputs), losses(copy.deepcopy(model), inputs)
    assert_same(given, expected)
    learned = copy.deepcopy(model)
    losses(learned, inputs)
    for name, block in blocks_of(learned).items():
        zero = getattr(block.norm, "weight", block.out.weight)
        assert zero.grad.abs().sum() > 0, name
    # From the second step on everything in a block learns.
    wake(learned)
    losses(in_float64(learned), inputs)
    for name, block in blocks_of(learned).items():
        sizes = {key: p.grad.norm().item() for key, p in block.named_parameters()}
        # Rounding leaves 1e-15 of the largest where there is no gradient; others have over 1e-8.
        without = {key for key, size in sizes.items() if size < 1e-12 * max(sizes.values())}
        assert without == without_gradient(block), name


def without_gradient(block):
    """The parameters of a block that change nothing, whatever they are."""
    # A softmax of products does not see a constant added to all keys.
    names = set() if block.qk_norm else {"phi.bias"}
    if getattr(block.norm, "num_groups", block.channels) == block.channels:
        if not isinstance(block.norm, nn.Identity):
            names.add("g.bias")  # nor a norm of single channels one added to all values
    return names


def test_a_checkpoint_loads_into_a_fresh_model(pair, tmp_path):
    cfg, _, model = pair
    trained = copy.deepcopy(model)
    wake(trained)
    DetectionCheckpointer(trained, str(tmp_path)).save("model")
    fresh = build_model(cfg).eval()
    NonLocalCheckpointer(fresh).load(str(tmp_path / "model.pth"))
    inputs = images(cfg, (64, 64))
    assert_same(outputs(fresh, inputs), outputs(trained, inputs))


def test_empty_and_tiny_inputs_go_through_every_position(pair):
    cfg, _, model = pair
    model = copy.deepcopy(model)
    wake(model)
    # No object at all, so no RoI has a mask or a keypoint; 32 pixels are one position of res5 and
    # p5; and sizes that are padded to each other's.
    for inputs in (images(cfg, (64, 64), (32, 96), instances=0), images(cfg, (64, 32), (32, 32))):
        for loss in losses(model, inputs).values():
            assert torch.isfinite(loss).all()
        assert outputs(model, inputs)


def mask_rcnn(positions, options=()):
    cfg = zoo_config(MASK_RCNN, ["MODEL.NONLOCAL.NORM", "", *options])
    cfg.MODEL.NONLOCAL.POSITIONS = positions
    return renamed(cfg, OURS)


def test_synchronized_batch_norm():
    cfg = mask_rcnn(RESNET, ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.NONLOCAL.NORM", "SyncBN"])
    stock, model = build_pair(cfg)
    assert names_without_blocks(model) == list(stock.state_dict())
    # It trains on GPUs only; what it starts from can be seen here.
    inputs = images(cfg, (64, 64))
    assert_same(outputs(model, inputs), outputs(stock, inputs))
    for block in blocks_of(model).values():
        assert isinstance(block.norm, nn.SyncBatchNorm) and not block.norm.weight.any()


def test_deformable_stages():
    try:
        DeformConv(1, 1, 1)(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2))
    except (ImportError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"detectron2 has no deformable convolution here: {error}")
    cfg = mask_rcnn(RESNET, ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]])
    stock, model = build_pair(cfg)
    assert names_without_blocks(model) == list(stock.state_dict())
    inputs = images(cfg, (64, 64))
    assert_same(outputs(model, inputs), outputs(stock, inputs))


def test_freezing_stages_leaves_blocks_after_them_free():
    cfg = mask_rcnn(("res4[0]", "res5[::2]", "p3"), ["MODEL.BACKBONE.FREEZE_AT", 3])
    stock, model = build_pair(cfg)
    learns = {name for name, p in stock.named_parameters() if p.requires_grad}
    assert any("res4" in name for name in learns) and not any("res3" in name for name in learns)
    losses(model, images(cfg, (64, 64)))
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name in moved if not re.search(r"\.nl|non_local", name)} == learns
    for name, block in blocks_of(model).items():
        assert block.out.weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("freeze_at", "free"), [(2, "res3, res4, res5"), (4, "res5")])
def test_a_block_in_a_frozen_stage_is_refused(freeze_at, free):
    with pytest.raises(PositionError, match=f"res2 is frozen.*FREEZE_AT.*{free}"):
        build_model(mask_rcnn(RESNET, ["MODEL.BACKBONE.FREEZE_AT", freeze_at]))


class Recording(NonLocalCheckpointer):
    """Keeps what loading found, and what it logs."""

    def __init__(self, model):
        super().__init__(model)
        self.logger = Mock()

    def _load_model(self, checkpoint):
        self.found = super()._load_model(checkpoint)
        return self.found

    @property
    def line(self):
        (line,) = [c.args[0] for c in self.logger.info.call_args_list if "tensors" in c.args[0]]
        return line


def load(model, path):
    checkpointer = Recording(model)
    checkpointer.load(str(path))
    return checkpointer


def assert_only_blocks_are_new(checkpointer, model, other=0):
    """All that the file lacks belongs to blocks, but ``other`` tensors."""
    blocks = blocks_of(model)
    inside = tuple(f"{name}." for name in blocks)
    missing = [key for key in checkpointer.found.missing_keys if not key.startswith(inside)]
    assert len(missing) == other
    assert f"; {len(blocks)} new blocks: {', '.join(blocks)}" in checkpointer.line
    assert checkpointer.line.startswith(
        f"{len(names_without_blocks(model)) - other} tensors loaded"
    )
    assert ("not in the checkpoint" in checkpointer.line) == (other > 0)


def test_a_model_zoo_checkpoint_lacks_only_the_blocks(tmp_path):
    stock, _ = build_pair(mask_rcnn(()))
    weights = {key: value.numpy() for key, value in stock.state_dict().items()}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    cfg = mask_rcnn((*RESNET, *PYRAMID, *MASK))
    model = build_model(cfg).eval()
    checkpointer = load(model, path)
    assert_only_blocks_are_new(checkpointer, model)
    assert "unexpected" not in checkpointer.line
    inputs = images(cfg, (64, 64))
    assert_same(outputs(model, inputs), outputs(stock, inputs))


def msra_name(key):
    """The name of a ResNet's tensor in the ImageNet files of Caffe2, or "" for a statistic."""
    key = key.replace("stem.conv1.norm", "res_conv1.norm").replace("stem.", "")
    key = key.replace("shortcut", "branch1")
    key = re.sub(r"(?<=\.)conv(\d)", lambda found: f"branch2{'_abc'[int(found[1])]}", key)
    for ours, theirs in (("norm.weight", "bn_s"), ("norm.bias", "bn_b"), ("weight", "w")):
        key = key.replace(ours, theirs)
    return "" if "running" in key else key.replace(".", "_")


def torchvision_name(key):
    """The name of a ResNet's tensor in torchvision."""
    key = re.sub(r"conv(\d)\.norm", r"bn\1", key.replace("stem.", ""))
    key = re.sub(r"res(\d)\.", lambda found: f"layer{int(found[1]) - 1}.", key)
    return key.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


def imagenet_file(source, weights):
    """The content of a classifier's file: detectron2's tool only renames torchvision's tensors."""
    if source == "MSRA":
        weights = {msra_name(key): value for key, value in weights.items() if msra_name(key)}
        some = {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_bn_b", "res4_5_branch2c_w"}
        assert some <= weights.keys()
        return {**weights, "fc1000_w": np.zeros((1000, 256)), "fc1000_b": np.zeros(1000)}
    if source == "torchvision, renamed by detectron2's tool":
        weights = {**weights, "stem.fc.weight": np.zeros((1000, 256))}
        return {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    weights = {torchvision_name(key): torch.tensor(value) for key, value in weights.items()}
    assert {"bn1.running_var", "layer1.0.downsample.1.bias", "layer4.2.conv3.weight"} <= set(
        weights
    )
    return {**weights, "fc.weight": torch.zeros(1000, 256)}


SOURCES = ("MSRA", "torchvision", "torchvision, renamed by detectron2's tool")


@pytest.mark.parametrize("source", SOURCES)
def test_an_imagenet_file_lacks_only_the_blocks_and_the_detector(source, tmp_path):
    stock, _ = build_pair(mask_rcnn(()))
    resnet = stock.backbone.bottom_up
    for module in resnet.modules():
        if hasattr(module, "running_var"):
            # What loading fills in for Caffe2: its files have statistics folded into the scale.
            module.running_var.fill_(1)
    weights = {key: value.numpy() for key, value in resnet.state_dict().items()}
    content = imagenet_file(source, weights)
    if source == "torchvision":
        path = tmp_path / "resnet50.pth"
        torch.save(content, path)
    else:
        path = tmp_path / "R-50.pkl"
        path.write_bytes(pickle.dumps(content))

    model = build_model(mask_rcnn(RESNET)).eval()
    checkpointer = load(model, path)
    detector = [key for key in stock.state_dict() if "bottom_up" not in key]
    assert_only_blocks_are_new(checkpointer, model, other=len(detector))
    assert "unexpected in the checkpoint: " in checkpointer.line and "fc" in checkpointer.line
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert_same(model.backbone.bottom_up(image), resnet(image))


def test_the_line_tells_a_wrong_checkpoint(tmp_path):
    _, model = build_pair(mask_rcnn(("res4[-2]", "p3")))
    weights = model.state_dict()
    weights["backbone.non_local.p3.g.weight"] = torch.zeros(3, 3)
    del weights["backbone.bottom_up.res4.nl4.theta.weight"]
    weights["another.weight"] = torch.zeros(1)
    torch.save({"model": weights}, tmp_path / "model.pth")
    line = load(model, tmp_path / "model.pth").line
    # A part of a block is no new block.
    assert "; no new block; " in line
    assert "1 not in the checkpoint: backbone.bottom_up.res4.nl4.theta.weight" in line
    assert "1 of another shape: backbone.non_local.p3.g.weight" in line
    assert "1 unexpected in the checkpoint: another.weight" in line
    assert line.startswith(f"{len(weights) - 2} tensors loaded")


BAD = {  # (the model zoo's file, options, position, what the message must say)
    "unknown level": (MASK_RCNN, [], "p8", ["'p8'", "no such position", "p2, p3, p4, p5, p6"]),
    "unused level": (MASK_RCNN, [], "p7", ["'p7'", "nothing uses p7"]),
    "level with an index": (MASK_RCNN, [], "p3[0]", ["'p3[0]'", "without an index"]),
    "unknown stage": (MASK_RCNN, [], "res6[0]", ["'res6[0]'", "no such position", "res2, res3"]),
    "unknown head": (MASK_RCNN, [], "cube_head[0]", ["'cube_head[0]'", "mask_head"]),
    "index": (MASK_RCNN, [], "res4[6]", ["'res4[6]'", "6 blocks", "from 0 to 5"]),
    "head index": (MASK_RCNN, [], "mask_head[4]", ["'mask_head[4]'", "4 convolutions"]),
    "masks off": (MASK_RCNN, ["MODEL.MASK_ON", False], "mask_head[0]", ["MODEL.MASK_ON is False"]),
    "keypoints off": (MASK_RCNN, [], "keypoint_head[0]", ["MODEL.KEYPOINT_ON is False"]),
    "no convolution": (MASK_RCNN, [], "box_head[0]", ["'box_head[0]'", "nothing to insert"]),
    "unused stage": (
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"]],
        "res5[0]",
        ["'res5[0]'", "nothing uses res5", "the last stage in use is res4"],
    ),
    "only precomputed proposals": (
        MASK_RCNN,
        ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"],
        "p6",
        ["nothing uses p6", "p2, p3, p4, p5, box_head"],
    ),
    "C4 has no level": ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", [], "p3", ["fpn_backbone"]),
    "C4's box head is res5": (
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
        [],
        "box_head[0]",
        ["res5 is the box head"],
    ),
    "RetinaNet has no head": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        [],
        "mask_head[0]",
        ["a RetinaNet has no mask_head", "p3, p4, p5, p6, p7"],
    ),
    "unknown setting": (
        MASK_RCNN,
        [],
        "p3 COLOR=red",
        ["'p3 COLOR=red'", "'COLOR'", "PAIRWISE"],
    ),
    "bad setting": (MASK_RCNN, [], "p3 PAIRWISE=cosine", ["'cosine'", "'dot_product'"]),
    "bad mechanism": (MASK_RCNN, [], "p3 MECHANISM=fast", ["'fast'", "'global_context'"]),
    "frozen norm": (MASK_RCNN, [], "p3 NORM=FrozenBN", ["'FrozenBN'", "never learn", "'GN'"]),
    "reduction": (MASK_RCNN, [], "p3 REDUCTION=64", ["64", "from 1 to 32"]),
    "not a position": (MASK_RCNN, [], "res4(2)", ["'res4(2)'", "is not a position"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_positions_say_what_where_and_what_would_be_right(case):
    path, options, position, said = BAD[case]
    cfg = renamed(zoo_config(path, ["MODEL.NONLOCAL.NORM", "", *options]), OURS)
    cfg.MODEL.NONLOCAL.POSITIONS = ("res4[0]", position)
    with pytest.raises(PositionError) as caught:
        build_model(cfg)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("position", "node"),
    [
        *(("res4[0]", "BACKBONE"), ("p3", "BACKBONE"), ("mask_head[0]", "ROI_MASK_HEAD")),
        *(("box_head[0]", "ROI_BOX_HEAD"), ("keypoint_head[0]", "ROI_KEYPOINT_HEAD")),
    ],
)
def test_a_position_with_the_stock_component_names_what_takes_it(position, node):
    cfg = renamed(zoo_config(MASK_RCNN, ["MODEL.KEYPOINT_ON", True]), OURS)
    cfg.MODEL[node].NAME = stock = STOCK[cfg.MODEL[node].NAME]
    cfg.MODEL.NONLOCAL.POSITIONS = (position,)
    # Nothing that is ours need be built for the check: training and evaluation make it first.
    with pytest.raises(PositionError, match=f"MODEL.{node}.NAME is '{stock}'.*NonLocal|nonlocal"):
        check_positions(cfg)


@pytest.mark.parametrize(
    "positions", [("p3", "p3"), ("res4[-1]", "res4[5]"), ("mask_head[:]",) * 2]
)
def test_the_same_position_twice_is_an_error(positions):
    with pytest.raises(PositionError, match="second block"):
        build_model(mask_rcnn(positions))


@pytest.fixture(scope="module")
def backbone():
    _, model = build_pair(mask_rcnn(("res4[-2]", "p3", "p6")))
    wake(model)
    return model.backbone


def scripted(backbone, image):
    import detectron2.export.torchscript  # noqa: F401  Makes a ResNet's blocks scriptable.

    return torch.jit.script(backbone)


def traced(backbone, image):
    return torch.jit.trace(backbone, image, strict=False)


LEAVES = {
    "script": scripted,
    "trace": traced,
    "copy": lambda backbone, image: copy.deepcopy(backbone),
    "pickle": lambda backbone, image: pickle.loads(pickle.dumps(backbone)),
}


@pytest.mark.parametrize("way", LEAVES)
def test_a_backbone_leaves_with_its_blocks(way, backbone):
    inputs = torch.rand(2, 3, 64, 64), torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        left = LEAVES[way](backbone, inputs[0])
        for image in inputs:
            assert_same(left(image), backbone(image))


def test_by_default_a_global_context_block_trains_on_one_image():
    """Batch norm would see one vector; the other mechanisms have the paper's."""
    cfg = renamed(zoo_config(MASK_RCNN), OURS)
    cfg.MODEL.NONLOCAL.POSITIONS = ("res4[0] MECHANISM=global_context", "p3")
    model = build_model(cfg)
    shared, pairwise = blocks_of(model).values()
    assert isinstance(shared.norm, torch.nn.Identity) and not shared.out.weight.any()
    assert isinstance(pairwise.norm, torch.nn.BatchNorm2d)
    assert all(loss.isfinite() for loss in losses(model, images(cfg, (64, 64))).values())


@pytest.mark.parametrize(
    ("norm", "num_images", "world_size", "works"),
    [
        *(("BN", 1, 1, False), ("BN", 1, 2, False), ("BN", 2, 1, True), ("GN", 1, 1, True)),
        *(("naiveSyncBN", 1, 1, False), ("naiveSyncBN", 1, 2, True), ("SyncBN", 1, 1, False)),
    ],
)
def test_a_norm_of_a_single_vector_is_refused(norm, num_images, world_size, works):
    cfg = renamed(zoo_config(MASK_RCNN, ["MODEL.NONLOCAL.NORM", norm]), OURS)
    cfg.MODEL.NONLOCAL.POSITIONS = ("res4[0] MECHANISM=global_context", "p3")
    model = build_model(cfg)
    if works:
        check_batch_norms(model, num_images, world_size)
    else:
        with pytest.raises(ValueError, match="res4.nl0 sees one vector per image"):
            check_batch_norms(model, num_images, world_size)
