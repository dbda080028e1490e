"""The result for an image does not depend on the batch that it is in.

detectron2's own convolutions see padding as far as their kernels reach, so an image's features
change near its border, in the stock model too. Here all kernels are reduced to their centers: then
the stock model does not see padding at all, and whatever is left comes through the blocks.

Mutations tried by hand; each makes at least one test here fail: no mask set; the mask of the rows
only; a group norm over padding too; the mask halved by rounding down; the mask
kept after the call; a mask where nothing is padded, or none in a trace of such an image; the
recorder without the mask.
"""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
from detectron2.structures import ImageList
from test_models import MASK_RCNN, MODELS
from tiny_models import (
    OURS,
    assert_same,
    blocks_of,
    build_pair,
    images,
    renamed,
    wake,
    zoo_config,
)

from nonlocal_det.attention import AttentionRecorder
from nonlocal_det.modeling.padding_mask import valid_pixel_mask

pytestmark = pytest.mark.numeric

SIZES = (70, 90), (128, 160)  # the first one alone is padded to 96 x 96
RESNET = ("res3[0]", "res4[-2]", "res5[-1]")
LEVELS = ("p2", "p3", "p6")

# name: (positions, options)
VARIANTS = {
    "resnet": (RESNET, {}),
    "levels": (LEVELS, {}),
    **{p: ((*RESNET, "p3"), {"PAIRWISE": p}) for p in ("gaussian", "dot_product", "concatenation")},
    "subsampled": ((*RESNET, *LEVELS), {"SUBSAMPLE": True}),
    "pooled first": ((*RESNET, *LEVELS), {"SUBSAMPLE": True, "POOL_FIRST": True}),
    "global context": ((*RESNET, "p3"), {"MECHANISM": "global_context"}),
    "disentangled": ((*RESNET, "p3"), {"MECHANISM": "disentangled", "SUBSAMPLE": True}),
    "compact": ((*RESNET, "p3"), {"MECHANISM": "compact_generalized", "GROUPS": 4}),
    "windows": ((*RESNET, "p3"), {"MECHANISM": "windowed", "WINDOW_SIZE": 4, "NUM_HEADS": 2}),
    "group norm": ((*RESNET, "p3"), {"NORM": "GN"}),
}


def configured(positions, options, path=MASK_RCNN, model=()):
    cfg = zoo_config(path, model)
    cfg.MODEL.NONLOCAL.POSITIONS = positions
    cfg.MODEL.NONLOCAL.update(options)
    return renamed(cfg, OURS)


def pair_of(cfg):
    """detectron2's model and ours, blocks awake, all kernels outside of RoI heads 1 x 1 in fact.

    In float64: where rounding is small, what is seen is the padding.
    """
    stock, model = build_pair(cfg)
    wake(model)
    for network in (stock, model):
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d) and "roi_heads" not in name:
                center = torch.zeros_like(layer.weight)
                y, x = (k // 2 for k in layer.kernel_size)
                center[:, :, y, x] = layer.weight.detach()[:, :, y, x] * max(layer.kernel_size)
                layer.weight.data = center
    return stock.double(), model.double()


def batch(model, inputs):
    """The input that detectron2's models pass to their backbones."""
    normalized = [(i["image"] - model.pixel_mean) / model.pixel_std for i in inputs]
    return ImageList.from_tensors(normalized, model.backbone.size_divisibility).tensor


@torch.no_grad()
def difference(model, inputs):
    """The largest, relative to the largest feature, between the first image alone and batched."""
    height, width = inputs[0]["image"].shape[1:]
    shapes = model.backbone.output_shape()
    alone, batched = (model.backbone(batch(model, i)) for i in (inputs[:1], inputs))
    worst = 0.0
    for name, shape in shapes.items():
        rows, columns = -(-height // shape.stride), -(-width // shape.stride)
        one, other = (f[name][0, :, :rows, :columns] for f in (alone, batched))
        assert one.shape == other.shape and one.abs().max() > 0
        worst = max(worst, float((one - other).abs().max() / one.abs().max()))
    return worst


def rounding(model, dtype=torch.float64):
    """What `difference` may be: convolutions add up their inputs, and blocks positions.

    Features do not grow on the way: normalisation halves what each branch adds.
    """
    terms = sum(w[0].numel() for w in model.backbone.parameters() if w.dim() == 4)
    terms += len(blocks_of(model)) * 32 * 40  # at stride 4, of the largest image
    return terms * torch.finfo(dtype).eps


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_alone_are_those_in_a_batch(variant):
    cfg = configured(*VARIANTS[variant])
    _, model = pair_of(cfg)
    assert difference(model, images(cfg, *SIZES)) <= rounding(model)


@pytest.mark.parametrize("variant", ("resnet", "levels", "dot_product", "pooled first"))
def test_without_the_mask_they_are_not(variant):
    positions, options = VARIANTS[variant]
    cfg = configured(positions, {**options, "MASK_PADDING": False})
    _, model = pair_of(cfg)
    assert difference(model, images(cfg, *SIZES)) > 1e6 * rounding(model)


@pytest.mark.parametrize("name", ("R18", "C4", "DC5", "RetinaNet", "panoptic", "proposals"))
def test_every_meta_architecture_of_detectron2(name):
    path, options, positions = MODELS[name]
    cfg = configured(positions, {"SUBSAMPLE": True, "NORM": ""}, path, options)
    stock, model = pair_of(cfg)
    # C4 and DC5 do not pad an image alone: sizes that no stride divides.
    inputs = images(cfg, (75, 50), (101, 125))
    assert difference(stock, inputs) <= rounding(stock)
    assert difference(model, inputs) <= rounding(model)
    with torch.no_grad():
        assert model.float()(inputs)


def test_detections_alone_are_those_in_a_batch():
    cfg = configured((*RESNET, *LEVELS), {})
    model = pair_of(cfg)[1].float()  # detectron2 finds no boxes in float64
    inputs = images(cfg, *SIZES)
    with torch.no_grad():
        alone, batched = model(inputs[:1])[0]["instances"], model(inputs)[0]["instances"]
    assert len(alone) == len(batched) > 0
    assert torch.equal(alone.pred_classes, batched.pred_classes)
    for one, other in (
        (alone.pred_boxes.tensor, batched.pred_boxes.tensor),
        (alone.scores, batched.scores),
    ):
        assert (one - other).abs().max() <= rounding(model, torch.float32) * one.abs().max()
    # A pixel at the threshold may fall on either side of it.
    assert (alone.pred_masks != batched.pred_masks).double().mean() < 1e-3


def test_a_new_block_is_the_identity_on_padding_too():
    cfg = configured((*RESNET, *LEVELS), {"SUBSAMPLE": True})
    stock, model = build_pair(cfg)
    inputs = images(cfg, *SIZES)
    with torch.no_grad():
        assert_same(model.backbone(batch(model, inputs)), stock.backbone(batch(stock, inputs)))


@pytest.fixture(scope="module")
def model():
    cfg = configured(("res4[-2]", "p3"), {"SUBSAMPLE": True})
    _, model = build_pair(cfg)
    wake(model)
    return model.double()


def masks_of_a_call(model, size):
    """The mask of each block during a call of the backbone with a padded image."""
    seen = {}
    handles = [
        block.register_forward_pre_hook(
            lambda block, args, name=name: seen.update({name: block.resolve_mask(args[0], None)})
        )
        for name, block in blocks_of(model).items()
    ]
    image = torch.ones(1, 3, 96, 64, dtype=torch.float64)
    image[:, :, size[0] :] = 0
    image[:, :, :, size[1] :] = 0
    with torch.no_grad():
        model.backbone(image)
    for handle in handles:
        handle.remove()
    return seen


def test_blocks_have_a_mask_during_a_call_and_where_something_is_padded(model):
    assert set(masks_of_a_call(model, (96, 64)).values()) == {None}
    masks = masks_of_a_call(model, (65, 33))
    strides = {"backbone.bottom_up.res4.nl4": 16, "backbone.non_local.p3": 8}
    assert masks.keys() == strides.keys()
    for name, stride in strides.items():
        rows, columns = -(-65 // stride), -(-33 // stride)
        expected = torch.zeros(1, 96 // stride, 64 // stride, dtype=torch.bool)
        expected[:, :rows, :columns] = True
        assert torch.equal(masks[name], expected)
    assert all(block.pixel_mask.numel() == 0 for block in blocks_of(model).values())


def test_only_the_end_of_an_image_is_padding():
    image = torch.zeros(2, 3, 6, 8)
    image[0, 1, 4, 2] = -0.5  # all before it is inside: a zero pixel is a pixel
    image[1, :, 0, 0] = float("nan")
    mask = valid_pixel_mask(image)
    expected = torch.zeros(2, 6, 8, dtype=torch.bool)
    expected[0, :5, :3] = True
    expected[1, 0, 0] = True
    assert torch.equal(mask, expected)


def test_a_bar_of_the_mean_color_gives_the_same_alone_and_batched():
    cfg = configured(("res4[-2]", "p3"), {}, model=["MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]])
    _, model = pair_of(cfg)
    inputs = images(cfg, *SIZES)
    inputs[0]["image"][:, 50:] = 0
    assert difference(model, inputs) <= rounding(model)
    black = images(cfg, *SIZES)
    black[0]["image"].zero_()
    with torch.no_grad():
        assert all(f.isfinite().all() for f in model.backbone(batch(model, black)).values())


def script(backbone, example):
    import detectron2.export.torchscript  # noqa: F401  Makes a ResNet's blocks scriptable.

    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(backbone), saved)
    saved.seek(0)
    return torch.jit.load(saved)


LEAVES = {
    "script": script,
    "trace": lambda backbone, example: torch.jit.trace(backbone, example, strict=False),
    "copy": lambda backbone, example: copy.deepcopy(backbone),
    "pickle": lambda backbone, example: pickle.loads(pickle.dumps(backbone)),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", LEAVES)
def test_the_mask_leaves_with_the_backbone(way, model):
    cfg = configured((), {})
    padded, whole = images(cfg, *SIZES, (96, 130)), images(cfg, (64, 64))
    with torch.no_grad():
        left = LEAVES[way](model.backbone, batch(model, whole))
        for inputs in (padded, whole, padded[:1]):
            given, expected = (b(batch(model, inputs)) for b in (left, model.backbone))
            for name, feature in expected.items():
                error = (given[name] - feature).abs().max()
                assert error <= rounding(model) * feature.abs().max(), name


def test_recorded_weights_are_those_the_model_used(model):
    """Queries of zero attend to all keys alike: to those of their own image only."""
    uniform = copy.deepcopy(model).float()
    for block in blocks_of(uniform).values():
        nn.init.zeros_(block.theta.weight)
        nn.init.zeros_(block.theta.bias)
    cfg = configured((), {})
    with torch.no_grad(), AttentionRecorder(uniform) as recorder:
        uniform(images(cfg, *SIZES))
    for block in recorder.recorded_blocks:
        for image in (0, 1):
            ((rows, _),) = recorder.attention_rows(block, [(10, 10)], image_index=image)
            # In float32, as it is recorded: the sum of ones is exact, and one division remains.
            assert rows == pytest.approx(1 / rows.size, rel=float(2 * np.finfo(np.float32).eps))
