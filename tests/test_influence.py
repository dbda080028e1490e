"""Influence of regions on detections: against models changed by hand, and by construction.

Mutations tried by hand; each makes at least one test here fail: queries masked with the keys;
regions in pixels of the resized image; rows and columns exchanged; cells of the padding counted;
the image of another index; outputs of another region, or for other inputs, taken for known ones;
nothing known; other threads, or nested uses, that get the replaced forward, or the next ones after
an error; the grid of another RoI; a probability after minus before; the least attended cells first.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, Instances
from test_attention import GEOMETRIES, Averages, Detector, input_dict, spot_at, spot_seeker
from tiny_models import blocks_of, build_pair, images, wake, zoo_config

from nonlocal_det.attention import AttentionQuery, AttentionRecorder, Influence
from nonlocal_det.attention.figures.influence_figure import grid_of, influence_figure
from nonlocal_det.attention.influence import influence as influence_module
from nonlocal_det.attention.influence.faithfulness import measure_faithfulness
from nonlocal_det.attention.recording.geometry import Grid
from nonlocal_det.layers import (
    CompactGeneralizedNonLocalBlock,
    DisentangledNonLocalBlock,
    GlobalContextBlock,
    NonLocalBlock,
    WindowedNonLocalBlock,
)

FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
MODELS = [
    pytest.param(FPN, "res4[-2]", "BN", id="res4"),
    pytest.param(FPN, "res4[-2] SUBSAMPLE=True", "GN", id="subsampled, GN"),
    pytest.param(FPN, "p2 MECHANISM=global_context", "", id="p2"),
    pytest.param(FPN, "box_head[0]", "", id="box head"),
    pytest.param(FPN, "mask_head[1]", "", id="mask head"),
    pytest.param(C4, "res4[-2]", "", id="C4"),
    pytest.param(C4, "res5[0]", "", id="res5"),
]


def detector(path: str, position: str, norm: str):
    """A stock model and ours with a block that is not the identity."""
    options = ["MODEL.NONLOCAL.POSITIONS", [position], "MODEL.NONLOCAL.NORM", norm]
    cfg = zoo_config(path, [*options, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1])
    stock, model = build_pair(cfg)
    wake(model)
    for block in blocks_of(model).values():
        factor = block.out if norm == "" else block.norm
        nn.init.normal_(factor.weight, std=0.5)
    return cfg, stock, model


def instances_of(size: tuple[int, int]) -> Instances:
    height, width = size
    boxes = [[2, 3, width / 2, height / 2], [width / 3, height / 4, width - 5, height - 9]]
    return Instances(size, pred_boxes=Boxes(torch.tensor(boxes)), pred_classes=torch.tensor([1, 2]))


def scores_by_hand(model, batch: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor):
    """Logits, probabilities and masks of boxes, by the modules of the model."""
    heads, of_image = model.roi_heads, [Boxes(boxes)]
    with torch.no_grad():
        features = model.backbone(batch)
        if hasattr(heads, "res5"):
            x = heads.res5(heads.pooler([features[f] for f in heads.in_features], of_image))
            logits, _ = heads.box_predictor(x.mean(dim=[2, 3]))
        else:
            x = heads.box_pooler([features[f] for f in heads.box_in_features], of_image)
            logits, _ = heads.box_predictor(heads.box_head(x))
        given = Instances((0, 0), pred_boxes=of_image[0], pred_classes=classes)
        (found,) = heads.forward_with_given_boxes(features, [given])
    rows = torch.arange(len(boxes))
    return logits[rows, classes], logits.softmax(1)[rows, classes], found.pred_masks[:, 0]


def keys_by_hand(x: torch.Tensor, boxes: np.ndarray, region, in_head: bool, size, padded):
    """True where a cell's center is outside of the region, by a loop over cells."""
    keys = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
    for index in range(x.shape[0]):
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                if in_head:
                    x0, y0, x1, y1 = boxes[index]
                    cell = ((x1 - x0) / x.shape[3], (y1 - y0) / x.shape[2])
                else:
                    x0 = y0 = 0
                    cell = (padded[1] / x.shape[3],) * 2
                center = [
                    start + (min((i + 1) * c, end) + i * c) / 2
                    for start, i, c, end in zip(
                        (x0, y0),
                        (column, row),
                        cell,
                        (np.inf, np.inf) if in_head else size[::-1],
                    )
                ]
                left, top, right, bottom = region
                if left <= center[0] <= right and top <= center[1] <= bottom:
                    keys[index, row, column] = False
    return keys


@pytest.mark.numeric
@pytest.mark.parametrize("path, position, norm", MODELS)
def test_influence_is_that_of_a_model_changed_by_hand(path: str, position: str, norm: str) -> None:
    cfg, _, model = detector(path, position, norm)
    model.double()
    inputs = images(cfg, (96, 128))
    inputs[0].update(height=48, width=64)  # before it was resized
    (name,) = blocks_of(model)
    block, found = blocks_of(model)[name], instances_of((48, 64))
    influence = Influence(model, inputs, found, block=name)
    batch = model.preprocess_image(inputs).tensor
    boxes, classes = 2 * found.pred_boxes.tensor, found.pred_classes
    before = scores_by_hand(model, batch, boxes, classes)
    torch.testing.assert_close(influence.scores.logits, before[0])
    regions = [(0.0, 0.0, 64.0, 96.0), (40.0, 20.0, 110.0, 70.0)]
    changes = influence.of_regions([np.divide(region, 2) for region in regions])
    assert changes.probability.shape == (2, 2)
    # Far above the tolerance of what follows.
    assert np.abs(changes.logit).max() > 1e-5 or changes.mask.max() > 1e-5
    for i, region in enumerate(regions):
        original = type(block).forward

        def forward(x, mask=None, region=region):
            keys = keys_by_hand(
                x, boxes.numpy(), region, x.shape[0] == 2, (96, 128), batch.shape[-2:]
            )
            return block.forward_with_keys(x, keys)

        vars(block)["forward"] = forward
        after = scores_by_hand(model, batch, boxes, classes)
        del vars(block)["forward"]
        assert block.forward.__func__ is original
        expected = [(b - a).numpy() for b, a in zip(before, after)]
        np.testing.assert_allclose(changes.logit[i], expected[0], atol=1e-9, rtol=1e-6)
        np.testing.assert_allclose(changes.probability[i], expected[1], atol=1e-9, rtol=1e-6)
        mask = np.abs(expected[2]).mean(axis=(1, 2))
        np.testing.assert_allclose(changes.mask[i], mask, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("path, position, norm", MODELS)
def test_without_the_block_it_is_the_stock_model(path: str, position: str, norm: str) -> None:
    """To the bit."""
    cfg, stock, model = detector(path, position, norm)
    inputs = images(cfg, (96, 128))
    (name,) = blocks_of(model)
    found = instances_of((96, 128))
    influence = Influence(model, inputs, found, block=name)
    off = influence.of_block()
    boxes, classes = found.pred_boxes.tensor, found.pred_classes
    batch = stock.preprocess_image(inputs).tensor
    logits, probabilities, _ = scores_by_hand(stock, batch, boxes, classes)
    np.testing.assert_array_equal(off.logit, (influence.scores.logits - logits).double().numpy())
    change = influence.scores.probabilities - probabilities
    np.testing.assert_array_equal(off.probability, change.double().numpy())


# ---- a block that reads one position


def reader(block: nn.Module) -> GeneralizedRCNN:
    """A detector whose features are means over 8 x 8 pixels, and whose logits are sums of them."""
    heads = StandardROIHeads(
        num_classes=2,
        batch_size_per_image=1,
        positive_fraction=1.0,
        proposal_matcher=Matcher([0.5], [0, 1]),
        box_in_features=["features"],
        box_pooler=ROIPooler(1, scales=[1 / 8], sampling_ratio=0, pooler_type="ROIAlignV2"),
        box_head=nn.Flatten(),
        box_predictor=FastRCNNOutputLayers(
            ShapeSpec(channels=3),
            box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
            num_classes=2,
        ),
    )
    nn.init.ones_(heads.box_predictor.cls_score.weight)
    model = GeneralizedRCNN(
        backbone=Averages(block),
        proposal_generator=nn.Identity(),
        roi_heads=heads,
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
    )
    return model.eval()


@pytest.mark.parametrize("original, resized, spot, subsample", GEOMETRIES)
def test_only_the_position_that_is_read_has_influence(original, resized, spot, subsample) -> None:
    block = spot_seeker(norm="", subsample=subsample or False)
    for conv in (block.g, block.out):
        nn.init.ones_(conv.weight)
    model = reader(block)
    other = input_dict(np.zeros((200, 200)), (200, 200))
    image = input_dict(spot_at(*spot, *original), resized)
    width, height = original
    # Far from the spot, so that the features there are the block's alone.
    x = 0.0 if spot[0] > width / 2 else width * 0.8
    found = Instances(
        (height, width),
        pred_boxes=Boxes(torch.tensor([[x, 0.0, x + width * 0.15, height * 0.2]])),
        pred_classes=torch.tensor([1]),
    )
    for batch, index in (([image], 0), ([other, image], 1)):
        influence = Influence(model, batch, found, block="backbone.nl", image_index=index)
        around = (spot[0] - 6, spot[1] - 6, spot[0] + 6, spot[1] + 6)
        whole, box = influence.of_regions([around, (0, 0, 1, 1)]).logit[:, 0]
        assert whole > 10 and box == pytest.approx(0, abs=1e-3)
        if not subsample:  # there the spot is on four cells, which are one key
            point = influence.of_regions([spot]).logit[0, 0]
            assert point == pytest.approx(whole, rel=1e-4)
            rows, columns = 5, 7
            grid = influence.map(rows, columns).logit[0]
            row, column = (
                int((spot[1] + 0.5) * rows / height),
                int((spot[0] + 0.5) * columns / width),
            )
            assert np.unravel_index(grid.argmax(), grid.shape) == (row, column)
            assert grid.max() == pytest.approx(whole, rel=1e-4)
            others = np.delete(grid.ravel(), row * columns + column)
            np.testing.assert_allclose(others, 0, atol=1e-3)
        mask = np.zeros((height, width), bool)
        mask[max(spot[1] - 12, 0) : spot[1] + 13, max(spot[0] - 12, 0) : spot[0] + 13] = True
        inside, outside = influence.of_regions([mask, ~mask]).logit[:, 0]
        assert inside == pytest.approx(whole, rel=1e-3) and outside == pytest.approx(0, abs=1e-3)

        def by_function(grid: Grid, mask: np.ndarray = mask) -> np.ndarray:
            x, y = (centers.astype(int) for centers in grid.centers())
            return mask[np.ix_(y, x)]

        of_function = influence.of_regions([by_function, lambda grid: ~by_function(grid)])
        np.testing.assert_allclose(of_function.logit[:, 0], [inside, outside], rtol=1e-6)


def test_what_is_read_is_faithful_to_what_is_attended_to() -> None:
    """Without the first cells by attention nothing is left, with them alone everything."""
    original, resized, spot = (100, 60), (160, 96), (72, 17)
    block = spot_seeker(norm="")
    for conv in (block.g, block.out):
        nn.init.constant_(conv.weight, 0.02)
    model = reader(block)
    nn.init.zeros_(model.roi_heads.box_predictor.cls_score.weight)
    nn.init.ones_(model.roi_heads.box_predictor.cls_score.weight[1])  # of class 1 alone
    boxes = torch.tensor([[0.0, 0.0, 15.0, 12.0], [5.0, 40.0, 20.0, 55.0]])
    found = Instances((60, 100), pred_boxes=Boxes(boxes), pred_classes=torch.tensor([1, 1]))
    inputs = [input_dict(spot_at(*spot, *original), resized)]
    with torch.no_grad(), AttentionRecorder(Detector(block)) as recorder:
        recorder._model(inputs)
    queries = [
        AttentionQuery(((b[0] + b[2]) / 2, (b[1] + b[3]) / 2), "", tuple(b)) for b in boxes.tolist()
    ]
    influence = Influence(model, inputs, found, block="backbone.nl")
    whole = influence.scores.probabilities.double().numpy()
    around = (spot[0] - 6, spot[1] - 6, spot[0] + 6, spot[1] + 6)
    without = whole - influence.of_regions([around]).probability[0]
    assert (whole - without > 0.1).all()
    measured = measure_faithfulness(
        recorder, influence, queries, block="backbone.nl", rows=6, columns=10, steps=6
    )
    for order in ("attention", "influence"):
        expected = np.stack([whole, *[without] * 6], axis=1)
        np.testing.assert_allclose(measured.deletion[order], expected, atol=1e-3)
        expected = np.stack([without, *[whole] * 6], axis=1)
        np.testing.assert_allclose(measured.insertion[order], expected, atol=1e-3)
    for curves in (measured.deletion, measured.insertion):
        values = curves["random"]
        assert values.shape == (2, 7) and (np.diff(values) != 0).sum() >= 2
        near = np.minimum(np.abs(values - whole[:, None]), np.abs(values - without[:, None]))
        np.testing.assert_allclose(near, 0, atol=1e-3)
    empty = Influence(model, inputs, found[:0], block="backbone.nl")
    none = measure_faithfulness(
        recorder, empty, [], block="backbone.nl", rows=2, columns=3, steps=2
    )
    assert none.correlation.shape == (0,) and none.deletion["random"].shape == (0, 3)


# ---- the block itself

BLOCKS = [
    *(pytest.param(NonLocalBlock, {"pairwise": p}, id=p) for p in ("gaussian", "dot_product")),
    pytest.param(NonLocalBlock, {"subsample": 2}, id="subsampled"),
    pytest.param(NonLocalBlock, {"pairwise": "concatenation"}, id="concatenation"),
    pytest.param(WindowedNonLocalBlock, {"window_size": 3}, id="windowed"),
    pytest.param(GlobalContextBlock, {"inner_channels": 4}, id="global context"),
    pytest.param(DisentangledNonLocalBlock, {}, id="disentangled"),
    pytest.param(CompactGeneralizedNonLocalBlock, {}, id="compact generalized"),
]


@pytest.mark.numeric
@pytest.mark.parametrize("kind, settings", BLOCKS)
def test_hidden_keys_have_no_effect_on_other_queries(kind: type, settings: dict[str, Any]) -> None:
    """Neither their features nor their number, and queries there still get an output."""
    torch.manual_seed(0)
    block = kind(8, norm="", **settings).double().eval()
    nn.init.normal_(block.out.weight)
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    keys = torch.rand(2, 6, 7) < 0.6
    with torch.no_grad():
        z = block.forward_with_keys(x, keys)
        changed = torch.where(keys.unsqueeze(1), x, torch.randn_like(x))
        again = block.forward_with_keys(changed, keys)
        seen = keys.unsqueeze(1).expand_as(x)
        torch.testing.assert_close(again[seen], z[seen])
        # Where no query is hidden, this is what `forward` computes under the same mask.
        torch.testing.assert_close(z[seen], block(x, keys)[seen])
        if kind is not DisentangledNonLocalBlock:
            assert not torch.allclose(z[~seen], x[~seen])
        everything = torch.ones_like(keys)
        assert torch.equal(block.forward_with_keys(x, everything), block(x, everything))
        nothing = block.forward_with_keys(x, ~everything)
        assert torch.isfinite(nothing).all()


# ---- the model stays as it is


@pytest.fixture(scope="module")
def small():
    cfg, _, model = detector(FPN, "res4[-2]", "")
    inputs, (name,) = images(cfg, (64, 96)), blocks_of(model)
    return model, inputs, name, instances_of((64, 96))


def is_untouched(model: nn.Module) -> bool:
    return not any("forward" in vars(module) for module in model.modules())


def test_nothing_stays_attached(small, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, name, found = small
    influence = Influence(model, inputs, found, block=name)
    influence.of_block()
    assert is_untouched(model)
    monkeypatch.setattr(F, "relu_", lambda x: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        influence.of_block()
    assert is_untouched(model)


def test_other_threads_see_the_model_as_it_is(small) -> None:
    model, inputs, name, found = small
    batch = model.preprocess_image(inputs).tensor
    with torch.no_grad():
        expected = model.backbone(batch)["p3"]
    influence, seen = Influence(model, inputs, found, block=name), []

    def look(x, mask=None):
        def run() -> None:
            with torch.no_grad():
                seen.append(model.backbone(batch)["p3"])

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return x

    influence._replay.run(look)
    assert torch.equal(seen[0], expected)


def test_nested_use_is_refused(small) -> None:
    model, inputs, name, found = small
    influence = Influence(model, inputs, found, block=name)
    with pytest.raises(RuntimeError, match="inside of another computation"):
        influence._replay.run(lambda x, mask=None: influence.of_block())
    assert is_untouched(model)


def test_what_is_before_the_block_runs_once(small) -> None:
    model, inputs, name, found = small
    calls = []
    handles = [
        part.register_forward_hook(lambda *_, name=part_name: calls.append(name))
        for part_name, part in model.backbone.bottom_up.named_modules()
        if part_name in ("stem.conv1", "res3.0.conv1", "res4.0.conv1", "res5.0.conv1")
    ]
    influence = Influence(model, inputs, found, block=name)
    influence.map(2, 2)
    for handle in handles:
        handle.remove()
    assert calls.count("res5.0.conv1") == 5
    assert calls.count("stem.conv1") == calls.count("res3.0.conv1") == 1
    assert calls.count("res4.0.conv1") == 1


def test_levels_without_a_detection_run_no_more(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many regions, and to the same results."""
    model, inputs, name, found = small
    influence = Influence(model, inputs, found, block=name)
    expected = influence.map(2, 2)
    monkeypatch.setattr(influence_module, "_MANY", 3)
    change = influence.map(2, 2)
    for field in ("probability", "logit", "box", "mask"):
        np.testing.assert_array_equal(getattr(change, field), getattr(expected, field))
    original = type(model.backbone.fpn_output3).forward
    computed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model.backbone.fpn_output3),
            "forward",
            lambda self, x: computed.append(self) or original(self, x),
        )
        influence.map(2, 2)
    assert computed.count(model.backbone.fpn_output2) == 4  # the detections are pooled from it
    assert computed.count(model.backbone.fpn_output3) == 0


# ---- figures


@pytest.mark.parametrize("size, columns", [((64, 96), 2), ((64, 512), 2)])
def test_attention_and_influence_side_by_side(small, size, columns) -> None:
    model, _, name, _ = small
    height, width = size
    found = instances_of(size)
    inputs = [{"image": torch.rand(3, height, width) * 255, "height": height, "width": width}]
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(inputs)
    image, queries = np.zeros((height, width, 3), np.uint8), []
    for box in found.pred_boxes.tensor.tolist():
        center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        queries.append(AttentionQuery(center, f"{len(queries) + 1} cat 90%", tuple(box)))
    for count in (0, 1, 2):
        losses = np.random.default_rng(0).normal(size=(count, 3, 5))
        figure = influence_figure(
            image, queries[:count], recorder, losses, overview=image, block=name
        )
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        panels = [title for title in titles if ": " in title]
        kinds = ("attention", "influence")
        expected = [f"{i + 1} cat 90%: {kind}" for i in range(count) for kind in kinds]
        assert panels == expected
        corners = {t: figure.axes[titles.index(t)].get_position() for t in panels}
        for i in range(count):
            attention, influenced = (corners[f"{i + 1} cat 90%: {kind}"] for kind in kinds)
            if width > 5 * height:
                assert attention.x0 < influenced.x0 and attention.y0 == influenced.y0
            else:
                assert attention.x0 == influenced.x0 and attention.y0 > influenced.y0


def test_cells_of_a_map_are_nearly_square() -> None:
    assert grid_of(1333, 800) == (8, 12)
    assert grid_of(512, 64) == (3, 32)
    assert grid_of(10_000, 10) == (1, 96)


# ---- bad input


@pytest.mark.parametrize(
    "region, said",
    [
        ((200, 10), "lies outside the image, which is 96 pixels wide and 64 high"),
        ((-30, 10, -10, 20), "lies outside the image"),
        ((1, 2, 3), r"has the shape \[3\]"),
        (np.ones((10, 10), bool), r"or a boolean mask \[64, 96\]"),
    ],
)
def test_regions_that_are_none(small, region: Any, said: str) -> None:
    model, inputs, name, found = small
    influence = Influence(model, inputs, found, block=name)
    with pytest.raises(ValueError, match=said):
        influence.of_regions([region])


def test_wrong_models_and_images(small) -> None:
    model, inputs, name, found = small
    with pytest.raises(KeyError, match="No non-local block has the name 'res9'; there are"):
        Influence(model, inputs, found, block="res9")
    with pytest.raises(ValueError, match="There is no image 1: there are 1"):
        Influence(model, inputs, found, block=name, image_index=1)
    with pytest.raises(ValueError, match="training mode"):
        Influence(model.train(), inputs, found, block=name)
    model.eval()
    retina = zoo_config(
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["MODEL.NONLOCAL.POSITIONS", ["res4[-2]"]]
    )
    _, other = build_pair(retina)
    with pytest.raises(TypeError, match="influence is for StandardROIHeads and Res5ROIHeads"):
        Influence(other, inputs, found, block=next(iter(blocks_of(other))))


def test_no_detections(small) -> None:
    model, inputs, name, found = small
    influence = Influence(model, inputs, found[:0], block=name)
    assert influence.of_regions([(1, 2)]).probability.shape == (1, 0)
    assert influence.of_block().mask.shape == (0,)
    assert influence.map(2, 3).logit.shape == (0, 2, 3)
    assert Influence(model, inputs, found, block=name).of_regions([]).box.shape == (0, 2)
