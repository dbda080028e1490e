"""The recorder against dense float64 references and synthetic images, and the drawing.

Mutations tried by hand; each makes at least one test here fail: x and y flipped; a map half a cell,
or half a pixel, off; padding not cropped; queries counted without padding; subsampling forgotten;
the scale of resizing inverted; a stride that is not a power of two; the padded size unknown; RoI
boxes not copied, not scaled, or the first image's for all; another RoI, or the largest; hooks left
behind; the top keys without magnitude; a box ignored; NaN painted; the colors of signs swapped;
arrows reversed; a former name that does not warn, or calls another function.
"""

from __future__ import annotations

import copy
import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.model_zoo import get_config_file
from detectron2.modeling import Backbone, GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, ImageList
from matplotlib.figure import Figure

from nonlocal_det import NonLocalBlock, add_nonlocal_config, attention
from nonlocal_det.attention import (
    AttentionQuery,
    AttentionRecorder,
    attention_figure,
    attention_panel,
    detection_figure,
    draw_arrows,
    draw_box,
    explorer_page,
    overlay_attention,
    resize_longest_side,
)
from nonlocal_det.attention.figures import instance_overlay, labels
from nonlocal_det.attention.recording.geometry import image_grid
from nonlocal_det.layers import MECHANISMS, PAIRWISE
from nonlocal_det.utils.plotting import save_figure

pytestmark = pytest.mark.numeric

STRIDE = 8


class Averages(Backbone):
    """Average-pools the image into cells and applies a block to them."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.nl = block

    def forward(self, x):
        return {"features": self.nl(F.avg_pool2d(x, STRIDE))}

    def output_shape(self):
        return {"features": ShapeSpec(channels=3, stride=STRIDE)}

    @property
    def size_divisibility(self):
        return 32


class Detector(nn.Module):
    """Pads and batches its images as detectron2's detectors do."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.backbone = Averages(block)

    def forward(self, inputs):
        images = [each["image"] for each in inputs]
        return self.backbone(ImageList.from_tensors(images, 32).tensor)["features"]


def spot_seeker(**settings) -> NonLocalBlock:
    """A block whose every position attends to the brightest one."""
    block = NonLocalBlock(3, inner_channels=1, scale=False, **settings)
    for name, weight, bias in (("theta", 0.0, 1.0), ("phi", 1.0, 0.0)):
        conv = getattr(block, name)
        nn.init.constant_(conv.weight, weight)
        nn.init.constant_(conv.bias, bias)
    return block.eval()


def input_dict(image: np.ndarray, resized: tuple[int, int]) -> dict:
    """A detectron2 input for a float image (H, W), resized by repeating pixels."""
    height, width = image.shape
    columns = ((np.arange(resized[0]) + 0.5) * width / resized[0]).astype(int)
    rows = ((np.arange(resized[1]) + 0.5) * height / resized[1]).astype(int)
    gray = torch.as_tensor(image[np.ix_(rows, columns)], dtype=torch.float32)
    return {"image": gray.expand(3, -1, -1).clone(), "height": height, "width": width}


def spot_at(x: int, y: int, width: int, height: int) -> np.ndarray:
    image = np.zeros((height, width))
    image[y - 1 : y + 2, x - 1 : x + 2] = 1000.0
    return image


# (width, height) before and after resizing, the pixel of the spot, which is the center of a cell,
# and the subsampling. Cells are 5 pixels wide and high in the first four cases, 20 in the next, and
# 10 in the last.
GEOMETRIES = [
    pytest.param((100, 60), (160, 96), (72, 17), False, id="landscape"),
    pytest.param((60, 100), (96, 160), (17, 87), False, id="portrait"),
    pytest.param((55, 35), (88, 56), (52, 32), False, id="padded to a multiple of 32"),
    pytest.param((60, 35), (160, 56), (28, 17), False, id="upscaled unevenly"),
    pytest.param((380, 220), (152, 88), (310, 130), False, id="downscaled"),
    pytest.param((95, 75), (152, 120), (75, 25), 2, id="subsampled"),
]


@pytest.mark.parametrize("original, resized, spot, subsample", GEOMETRIES)
def test_bright_spot_is_found_where_it_is(original, resized, spot, subsample):
    model = Detector(spot_seeker(subsample=subsample or False))
    # A larger image in the batch pads this one on the right and at the bottom.
    other = input_dict(np.zeros((200, 200)), (200, 200))
    image = input_dict(spot_at(*spot, *original), resized)
    for batch, index in (([image], 0), ([other, image], 1)):
        with AttentionRecorder(model) as recorder:
            model(batch)
        maps = recorder.attention_maps("backbone.nl", [(1, 1), (30.5, 20)], image_index=index)
        assert maps.shape == (2, original[1], original[0])
        for attn_map in maps:
            y, x = np.argwhere(attn_map == attn_map.max()).mean(axis=0)
            assert abs(x - spot[0]) <= 1 and abs(y - spot[1]) <= 1
        top_keys = recorder.top_k("backbone.nl", (1, 1), 3, image_index=index)
        x, y, weight = top_keys[0]
        assert abs(x - spot[0] - 0.5) <= 1 and abs(y - spot[1] - 0.5) <= 1
        assert weight > 0.99 and len(top_keys) == 3
        cells = recorder.attention_maps(
            "backbone.nl", [(1, 1)], image_index=index, interpolate=False
        )
        assert cells.max() == np.float32(weight)


def dense_row(block: NonLocalBlock, x: torch.Tensor, row: int, column: int) -> np.ndarray:
    """The attention weights of one query of x (1, C, H, W) as in the paper, in float64."""
    block, x = copy.deepcopy(block).double(), x.double()
    queries, keys = (x, x) if block.pairwise == "gaussian" else (block.theta(x), block.phi(x))
    theta = queries[0, :, row, column]
    phi = F.max_pool2d(keys, block.stride, ceil_mode=True)[0]
    logits = torch.einsum("d,dhw->hw", theta, phi)
    if block.pairwise in ("gaussian", "embedded_gaussian"):
        f = (logits - logits.max()).exp()
        return (f / f.sum()).detach().numpy()
    if block.pairwise == "concatenation":
        first, second = block.w_f.chunk(2)
        logits = ((first @ theta) + torch.einsum("d,dhw->hw", second, phi)).relu()
    return (logits / logits.numel()).detach().numpy()


@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("subsample", [False, 2])
def test_map_is_the_dense_row_in_image_coordinates(pairwise, subsample):
    torch.manual_seed(0)
    settings = {"inner_channels": 2, "subsample": subsample, "scale": False}
    block = NonLocalBlock(3, pairwise=pairwise, **settings).eval()
    model, rng = Detector(block), np.random.default_rng(0)
    # 100 x 60 becomes 160 x 96, of 20 x 12 cells; the batch is 192 x 128, of 24 x 16 cells.
    image = input_dict(rng.random((60, 100)), (160, 96))
    inputs = [input_dict(rng.random((128, 192)), (192, 128)), image]
    with AttentionRecorder(model) as recorder:
        model(inputs)
    point = [(33.2, 41.9)]
    attn_map = recorder.attention_maps("backbone.nl", point, image_index=1, interpolate=False)[0]

    batch = ImageList.from_tensors([each["image"] for each in inputs], 32).tensor
    # x = 33.2 is 53.1 resized, in column 6; y = 41.9 is 67.0 resized, in row 8.
    row = dense_row(block, F.avg_pool2d(batch, 8)[1:], row=8, column=6)
    cell = 8 * block.stride
    for y in range(60):
        for x in range(100):
            expected = row[int((y + 0.5) * 1.6 // cell), int((x + 0.5) * 1.6 // cell)]
            assert attn_map[y, x] == pytest.approx(expected, rel=1e-4, abs=1e-7)

    # Interpolation keeps the weights at the centers: pixels 2, 7, 12 ... of cells of 5 pixels.
    if block.stride == 1:
        interpolated = recorder.attention_maps("backbone.nl", point, image_index=1)[0]
        np.testing.assert_allclose(interpolated[2::5, 2::5], row[:12, :20], rtol=1e-4, atol=1e-7)


def test_top_k_are_the_largest_by_magnitude():
    grid = image_grid((2, 2), padded=(32, 32), resized=(30, 20), original=(60, 40))
    # Cells of 32 pixels; 28 and 8 pixels of the last ones lie in the image.
    top_keys = grid.top_k(np.array([[0.1, -0.9], [0.5, 0.0]]), 3)
    assert top_keys == [(46, 16, -0.9), (16, 36, 0.5), (16, 16, 0.1)]


def test_interpolated_map_is_linear_between_centers_and_constant_beyond():
    model = Detector(spot_seeker())
    with AttentionRecorder(model) as recorder:
        model([input_dict(np.zeros((8, 24)), (24, 8))])
    grid = recorder.grid("backbone.nl")
    assert (grid.columns, grid.rows) == (3, 1)
    line = grid.to_image(np.array([[[0.0, 16.0, 0.0]]]), 24, 8)[0, 3]
    # Cell centers lie between pixels 3 and 4, 11 and 12, 19 and 20; pixel centers are at + 0.5.
    assert line[:5].tolist() == [0, 0, 0, 0, 1]
    assert line[10:14].tolist() == [13, 15, 15, 13]
    assert line[-5:].tolist() == [1, 0, 0, 0, 0]


def mask_rcnn(positions: tuple[str, ...], *options: object) -> nn.Module:
    """A small Mask R-CNN whose proposals, and thus detections, are its anchors.

    Features and embeddings are small: of the weights in a row, none is nearly one, or zero.
    """
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.merge_from_list(
        ["DEVICE", "cpu", "WEIGHTS", "", "RESNETS.DEPTH", 18, "RESNETS.RES2_OUT_CHANNELS", 64]
        + ["BACKBONE.NAME", "build_nonlocal_resnet_fpn_backbone"]
        + ["ROI_MASK_HEAD.NAME", "NonLocalMaskRCNNConvUpsampleHead"]
        + ["FPN.OUT_CHANNELS", 32, "ROI_BOX_HEAD.FC_DIM", 64, "ROI_MASK_HEAD.CONV_DIM", 32]
        + ["RPN.POST_NMS_TOPK_TEST", 20, "ROI_HEADS.SCORE_THRESH_TEST", 0.0]
        + ["NONLOCAL.POSITIONS", positions, "NONLOCAL.INIT", "gaussian"]
        + ["NONLOCAL.SCALE", False]
    )
    cfg.TEST.DETECTIONS_PER_IMAGE = 4
    cfg.merge_from_list(list(options))
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.mul_(0.5)
    nn.init.zeros_(model.proposal_generator.rpn_head.anchor_deltas.weight)
    nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.weight)
    return model


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return mask_rcnn(("res4[-2]", "p3", "mask_head[1]"))


def random_inputs(*sizes: tuple[int, int]) -> list[dict]:
    """Random images of the given (width, height), resized by 1.6."""
    rng = np.random.default_rng(1)
    return [
        input_dict(rng.random((height, width)) * 255, (int(width * 1.6), int(height * 1.6)))
        for width, height in sizes
    ]


def test_names_are_those_of_the_modules(detector):
    assert AttentionRecorder(detector).block_names == [
        "backbone.bottom_up.res4.nl0",
        "backbone.non_local.p3",
        "roi_heads.mask_head.nl_mask_fcn2",
    ]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def fields_of(outputs: list[dict]) -> list[torch.Tensor]:
    instances = [output["instances"] for output in outputs]
    return [t for i in instances for t in (i.pred_boxes.tensor, i.scores, i.pred_masks)]


@torch.no_grad()
def test_recording_changes_nothing_and_leaves_nothing(detector):
    inputs = random_inputs((100, 60), (80, 80))
    before, hooks = fields_of(detector(inputs)), hooks_of(detector)
    with AttentionRecorder(detector) as recorder:
        assert hooks_of(detector) > hooks
        inside = fields_of(detector(inputs))
    assert hooks_of(detector) == hooks
    with pytest.raises(RuntimeError, match="inside"), recorder:
        detector(inputs)
        raise RuntimeError("inside")
    assert hooks_of(detector) == hooks
    after = fields_of(detector(inputs))
    assert len(before) == 6
    for one, two, three in zip(before, inside, after):
        assert torch.equal(one, two) and torch.equal(one, three)


@torch.no_grad()
def test_only_the_requested_rows_are_computed(detector, monkeypatch):
    block = detector.backbone.non_local["p3"]
    computed = []

    def attention_weights(x, queries, mask=None):
        computed.append((len(x), queries.tolist()))
        return NonLocalBlock.attention_weights(block, x, queries, mask)

    monkeypatch.setattr(block, "attention_weights", attention_weights)
    with AttentionRecorder(detector) as recorder:
        detector(random_inputs((100, 60), (80, 80)))
    assert computed == []
    # Cells are 8 / 1.6 = 5 pixels; the batch is 160 x 128, of 20 cells a row.
    recorder.attention_maps("backbone.non_local.p3", [(0, 0), (99.9, 12)], image_index=0)
    assert computed == [(1, [0, 2 * 20 + 19])]


@torch.no_grad()
def test_box_is_the_mean_of_its_cells(detector):
    with AttentionRecorder(detector) as recorder:
        detector(random_inputs((100, 60)))
    name = "backbone.non_local.p3"
    # The centers of 3 x 2 cells of 5 pixels lie in the box; no center lies in the second one.
    box, small = (10, 20, 25, 30), (31, 31, 32, 32)
    points = [(x, y) for y in (22, 27) for x in (12, 17, 22)]
    maps = recorder.attention_maps(name, [box, small])
    expected = recorder.attention_maps(name, points).mean(axis=0)
    np.testing.assert_allclose(maps[0], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(maps[1], recorder.attention_maps(name, [(31.5, 31.5)])[0])


@torch.no_grad()
def test_map_of_a_block_in_a_head_lies_in_the_roi_of_its_detection(detector):
    name, block = "roi_heads.mask_head.nl_mask_fcn2", detector.roi_heads.mask_head.nl_mask_fcn2
    inputs, block_inputs = random_inputs((100, 60), (80, 80)), []
    handle = block.register_forward_hook(lambda _, args, output: block_inputs.append(args[0]))
    with AttentionRecorder(detector) as recorder:
        outputs = detector(inputs)
    handle.remove()
    first, second = (output["instances"] for output in outputs)
    assert len(block_inputs[0]) == len(first) + len(second) and len(second) >= 2
    for index, box in enumerate(second.pred_boxes.tensor.double().numpy()):
        x0, y0, x1, y1 = box
        point = (x0 + (x1 - x0) * 0.3, y0 + (y1 - y0) * 0.6)
        attn_map = recorder.attention_maps(
            name, [point], image_index=1, roi_boxes=[box], interpolate=False
        )[0]
        # 0.3 and 0.6 of 14 cells are the cells 4 and 8.
        row = dense_row(block, block_inputs[0][[len(first) + index]], row=8, column=4)
        assert 0 < 2 * row.min() < row.max() < 0.1
        for y in range(80):
            for x in range(80):
                u, v = (x + 0.5 - x0) / (x1 - x0) * 14, (y + 0.5 - y0) / (y1 - y0) * 14
                if 1e-3 < u < 13.999 and 1e-3 < v < 13.999 and min(u % 1, v % 1) > 1e-3:
                    assert attn_map[y, x] == pytest.approx(row[int(v), int(u)], rel=1e-4)
                if u < -1e-3 or v < -1e-3 or u > 14.001 or v > 14.001:
                    assert np.isnan(attn_map[y, x])
        # The arrows stay inside as well.
        for x, y, _ in recorder.top_k(name, point, 5, image_index=1, roi_box=box):
            assert x0 <= x <= x1 and y0 <= y <= y1


@torch.no_grad()
def test_roi_without_a_box_is_the_smallest_around_the_point(detector):
    name = "roi_heads.mask_head.nl_mask_fcn2"
    with AttentionRecorder(detector) as recorder:
        detector(random_inputs((100, 60)))
    rois = recorder.roi_boxes(name)
    areas = (rois[:, 2:] - rois[:, :2]).prod(axis=1)
    smallest = rois[areas.argmin()]
    center = (smallest[:2] + smallest[2:]) / 2
    by_default = recorder.attention_maps(name, [center])
    expected = recorder.attention_maps(name, [center], roi_boxes=[smallest])
    np.testing.assert_array_equal(by_default, expected)
    assert recorder.roi_boxes("backbone.non_local.p3") is None


@torch.no_grad()
def test_c4_heads_are_recorded_on_their_detections():
    model = mask_rcnn(
        ("res5[0]",),
        *["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.OUT_FEATURES", ["res4"]],
        *["MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "MODEL.RPN.IN_FEATURES", ["res4"]],
        *["MODEL.BACKBONE.NAME", "build_resnet_backbone"],
        *["MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]], "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]],
        *["MODEL.ROI_HEADS.NAME", "NonLocalRes5ROIHeads", "MODEL.ROI_BOX_HEAD.NAME", ""],
        *["MODEL.ROI_MASK_HEAD.NUM_CONV", 0],
    )
    with AttentionRecorder(model) as recorder:
        boxes = model(random_inputs((50, 40)))[0]["instances"].pred_boxes.tensor
    # res5 runs on the proposals, then on the detections: the latter count.
    np.testing.assert_allclose(recorder.roi_boxes("roi_heads.res5.nl0"), boxes, atol=1e-3)
    # 7 x 7 pooled cells become 4 x 4 of two each, the last ones half outside.
    grid, width = recorder.grid("roi_heads.res5.nl0", roi_index=0), float(boxes[0, 2] - boxes[0, 0])
    assert grid.columns == grid.rows == 4
    assert grid.cell_width == pytest.approx(width * 2 / 7, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("ordinary_call_before", [False, True])
def test_parts_of_a_model_are_not_recorded_as_a_call_of_it(detector, ordinary_call_before):
    """Neither old RoIs nor old image sizes are taken for those of the call."""
    small, large = random_inputs((100, 60)), random_inputs((200, 150))
    augmentation = get_cfg()
    augmentation.TEST.AUG.MIN_SIZES, augmentation.MODEL.MASK_ON = (64,), True
    calls = [
        lambda: detector.inference(large, do_postprocess=False),
        lambda: detector.backbone(detector.preprocess_image(large).tensor),
        lambda: detector.backbone.non_local["p3"](torch.zeros(1, 32, 8, 8)),
        lambda: GeneralizedRCNNWithTTA(augmentation, detector)(large),
    ]
    for call in calls:
        with AttentionRecorder(detector) as recorder:
            if ordinary_call_before:
                detector(small)
            call()
        assert "backbone.non_local.p3" in recorder.recorded_blocks
        for ask in (recorder.roi_boxes, recorder.grid):
            with pytest.raises(ValueError, match="sizes of the recorded images are unknown"):
                ask("backbone.non_local.p3")
        with recorder:
            detector(small)
        assert recorder.roi_boxes("backbone.non_local.p3") is None
        assert recorder.attention_maps("backbone.non_local.p3", [(9, 9)]).shape == (1, 60, 100)


@torch.no_grad()
def test_a_call_that_fails_is_over(detector):
    inputs = random_inputs((100, 60))
    with AttentionRecorder(detector) as recorder:
        with pytest.raises(RuntimeError):
            detector([{**inputs[0], "image": torch.zeros(7, 60, 100)}])
        detector.inference(inputs)
    with pytest.raises(ValueError, match="sizes of the recorded images are unknown"):
        recorder.grid("backbone.non_local.p3")


@torch.no_grad()
def test_arguments_may_have_their_names(detector):
    inputs = random_inputs((100, 60))
    name, maps = "backbone.non_local.p3", []
    for arguments in (((inputs,), {}), ((), {"batched_inputs": inputs})):
        with AttentionRecorder(detector) as recorder:
            detector(*arguments[0], **arguments[1])
        maps.append(recorder.attention_maps(name, [(9, 9)]))
    np.testing.assert_array_equal(*maps)
    block, x = NonLocalBlock(8).eval(), torch.randn(2, 8, 5, 6)
    mask = torch.rand(2, 5, 6) > 0.3
    with AttentionRecorder(block) as recorder:
        block(mask=mask, x=x)
    assert torch.equal(recorder._call.block_call("").mask, mask)
    pooler = ROIPooler(4, [1.0], 0, "ROIAlignV2")
    with AttentionRecorder(nn.Sequential(pooler)) as recorder:
        pooler(box_lists=[Boxes(torch.tensor([[0.0, 0, 4, 4]]))], x=[x[:1]])
    assert recorder._call.rois.boxes[0].tolist() == [[0, 0, 4, 4]]


def test_inputs_of_a_model_without_a_backbone_must_be_a_tensor():
    class Model(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs[0]["image"][None])

    with torch.no_grad(), AttentionRecorder(Model(NonLocalBlock(3))) as recorder:
        recorder._model([{"image": torch.randn(3, 8, 8)}])
    with pytest.raises(ValueError, match="size of the padded batch is unknown"):
        recorder.attention_maps("0", [(1, 1)])


def test_model_without_detections_or_blocks():
    model = mask_rcnn(("mask_head[0]",), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.1)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(random_inputs((100, 60)))
    for name in recorder.recorded_blocks:
        assert len(recorder.roi_boxes(name)) == 0
        with pytest.raises(ValueError, match="No RoI"):
            recorder.attention_maps(name, [(1, 1)])
    with AttentionRecorder(nn.Conv2d(3, 3, 1)) as recorder:
        assert recorder.block_names == recorder.recorded_blocks == []


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_is_recorded_in_any_network(mechanism):
    torch.manual_seed(0)
    block = MECHANISMS[mechanism](8, inner_channels=4).eval()
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), block)
    x = torch.randn(2, 3, 24, 40)
    with AttentionRecorder(model) as recorder:
        model(x)
    maps = recorder.attention_maps("1", [(39, 1), (0, 23)], image_index=1, interpolate=False)
    features = model[0](x).detach().double()[1:]
    rows = copy.deepcopy(block).double().attention_weights(features, torch.tensor([9, 50]))[0]
    np.testing.assert_allclose(maps[:, 2::4, 2::4], rows.detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "queries, error",
    [
        ([(100.1, 5)], r"point \(100.1, 5\) lies outside: x goes from 0 to 100"),
        ([(5, -0.1)], "lies outside"),
        ([(np.nan, 5)], "lies outside"),
        ([(1, 2, 3)], r"must be \(Q, 2\) points"),
    ],
)
def test_bad_queries_are_reported(queries, error):
    with AttentionRecorder(Detector(spot_seeker())) as recorder:
        recorder._model([input_dict(np.zeros((60, 100)), (100, 60))])
    with pytest.raises(ValueError, match=error):
        recorder.attention_maps("backbone.nl", queries)


def test_bad_names_and_indices_are_reported():
    recorder = AttentionRecorder(Detector(spot_seeker()))
    with pytest.raises(KeyError, match="Recorded: none; call the model inside the context"):
        recorder.attention_maps("backbone.nl", [(1, 1)])
    with recorder:
        recorder._model([input_dict(np.zeros((60, 100)), (100, 60))])
    with pytest.raises(KeyError, match=r"No block 'res4' was recorded. Recorded: backbone.nl"):
        recorder.attention_maps("res4", [(1, 1)])
    with pytest.raises(IndexError, match="no image 1: the recorded call has 1"):
        recorder.attention_maps("backbone.nl", [(1, 1)], image_index=1)
    assert recorder.attention_maps("backbone.nl", []).shape == (0, 60, 100)


def test_networks_that_do_not_pad_have_cells_of_a_power_of_two():
    # 75 x 50 pixels are 5 x 4 cells of 16, though 75 / 5 is 15.
    grid = image_grid((5, 4), padded=(75, 50), resized=(75, 50), original=(150, 50))
    assert (grid.cell_width, grid.cell_height) == (32, 16)
    # The last cells extend beyond the image; their centers are those of the part inside.
    assert grid.centers()[0].tolist() == [16, 48, 80, 112, 139]
    assert grid.centers()[1].tolist() == [8, 24, 40, 49]
    assert grid.cells_at(np.array([[150, 50], [32, 15.9]])).tolist() == [[4, 3], [1, 0]]


GRADIENT = np.tile(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (40, 1, 3))


def test_drawing_keeps_its_input_and_returns_images():
    image, attn_map = GRADIENT.copy(), np.linspace(0, 1, 2400).reshape(40, 60)
    query = AttentionQuery((30, 20), "1 lamp 98%", (10, 5, 50, 35))
    drawn = [
        overlay_attention(image, attn_map),
        draw_arrows(image, (30, 20), [(5, 5, 0.4), (30, 20, 0.2), (55, 30, 0.1)]),
        draw_box(image, (10, 5, 50, 35), "lamp"),
        draw_box(image, (-5, -5, 70, 50), "a label much wider than the image itself"),
    ]
    for result in drawn:
        assert result.dtype == np.uint8 and result.shape == image.shape
        assert not np.array_equal(result, image)
    panel = attention_panel(image, attn_map, query, [(5, 5, 0.4)], target_length=300)
    assert panel.shape == (200, 300, 3)
    assert np.array_equal(image, GRADIENT)


def test_overlay_is_brightest_at_the_largest_weight_and_absent_at_nan():
    attn_map = np.full((40, 60), np.nan)
    attn_map[:, 30:] = 0.001
    attn_map[10, 50] = 0.2
    dark = GRADIENT // 4  # the image shows through where weights are small
    drawn = overlay_attention(dark, attn_map).astype(int)
    np.testing.assert_array_equal(drawn[:, :30], dark[:, :30])
    np.testing.assert_allclose(drawn[20:, 30:], dark[20:, 30:], atol=2)
    brightest = np.unravel_index(drawn.sum(axis=2).argmax(), attn_map.shape)
    assert brightest == (10, 50)
    # Warm colors for positive weights, cold ones for negative weights.
    signed = overlay_attention(GRADIENT, np.where(np.arange(60) < 30, -1.0, 1.0) * np.ones((40, 1)))
    assert (signed[:, :30, 2] > signed[:, :30, 0]).all()
    assert (signed[:, 30:, 0] > signed[:, 30:, 2]).all()


def test_where_nothing_is_attended_to_the_image_shows_unchanged():
    rng = np.random.default_rng(0)
    colorful = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for sign in (1, -1):
        attn_map = np.zeros((40, 60))
        attn_map[:, :7] = sign
        drawn = overlay_attention(colorful, attn_map)
        np.testing.assert_array_equal(drawn[:, 7:], colorful[:, 7:])
        assert (drawn[:, :7] != colorful[:, :7]).any(axis=2).all()


@pytest.mark.parametrize("radius", [6, 20])
def test_enlarged_masks_have_smooth_edges(radius):
    """Of a disk: its contour is at most 2% longer than a circle; with stairs, 6 to 7%."""
    y, x = np.mgrid[:50, :60] + 0.5
    mask = np.hypot(x - 30, y - 25) < radius
    enlarged = instance_overlay._resized_mask(mask, (600, 500)) > 0.5
    (contour,), _ = cv2.findContours(enlarged.astype(np.uint8), 0, cv2.CHAIN_APPROX_TC89_KCOS)
    assert 0.9 < cv2.arcLength(contour, True) / (2 * math.pi * 10 * radius) < 1.05
    y, x = (np.mgrid[:500, :600] + 0.5) / 10
    disk = np.hypot(x - 30, y - 25) < radius
    assert (enlarged & disk).sum() / (enlarged | disk).sum() > 0.96
    # To the border of the image, and smaller than the mask.
    left = x[:50, :60] < 3
    assert (instance_overlay._resized_mask(left, (600, 500)) > 0.5)[:, :25].all()
    assert instance_overlay._resized_mask(mask, (30, 25)).sum() == pytest.approx(
        mask.sum() / 4, rel=0.1
    )


def test_arrow_points_where_it_should():
    black = np.zeros((100, 200, 3), np.uint8)
    drawn = draw_arrows(black, (40.5, 50.5), [(160.5, 50.5, 1.0)]).sum(axis=2) > 300
    rows, columns = np.nonzero(drawn)
    assert rows.min() + rows.max() == 100
    # From the dot around the start to beside the key; the head is wider than the shaft.
    assert 35 <= columns.min() < 40 and 156 <= columns.max() < 160
    assert drawn[:, 155].sum() > drawn[:, 100].sum() >= 1


@pytest.mark.parametrize("attn_map", [np.zeros((1, 1)), np.full((1, 1), np.nan), -np.ones((1, 1))])
def test_one_pixel_is_drawn(attn_map):
    image = np.array([[[1, 2, 3]]], np.uint8)
    query = AttentionQuery((0.5, 0.5), "x", (0, 0, 1, 1))
    assert attention_panel(image, attn_map, query, [(0.5, 0.5, 0)]).shape == (480, 480, 3)


@pytest.mark.parametrize(
    "image, attn_map",
    [
        (GRADIENT.astype(float), np.zeros((40, 60))),
        (GRADIENT[:, :, 0], np.zeros((40, 60))),
        (GRADIENT[:0], np.zeros((0, 60))),
        (GRADIENT, np.zeros((60, 40))),
    ],
)
def test_bad_images_and_maps_of_another_size_are_reported(image, attn_map):
    with pytest.raises(ValueError, match="The (image|attention map) is"):
        overlay_attention(image, attn_map)


@torch.no_grad()
@pytest.mark.parametrize(
    "num_detections, blocks", [(0, None), (1, ["backbone.non_local.p3"]), (4, None)]
)
def test_figure_has_a_panel_for_each_block_and_detection(
    detector, tmp_path, num_detections, blocks
):
    with AttentionRecorder(detector) as recorder:
        instances = detector(random_inputs((100, 60)))[0]["instances"]
    image = np.zeros((60, 100, 3), np.uint8)
    figure = detection_figure(
        image, instances, recorder, max_detections=num_detections, blocks=blocks
    )
    # The overview, the panels, and a color bar if there are panels.
    panels = num_detections * len(blocks or recorder.recorded_blocks)
    assert len(figure.axes) == 1 + panels + (panels > 0)
    for ending, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        path = tmp_path / "new" / f"figure.{ending}"
        save_figure(figure, str(path))
        assert path.read_bytes().startswith(magic)


@torch.no_grad()
def test_panels_of_a_wide_image_are_below_its_overview(detector):
    with AttentionRecorder(detector) as recorder:
        instances = detector(random_inputs((400, 50)))[0]["instances"]
    image, block = np.zeros((50, 400, 3), np.uint8), ["backbone.non_local.p3"]
    figure = detection_figure(image, instances, recorder, max_detections=4, blocks=block)
    (left, bottom), *corners = (tuple(axes.get_position().p0) for axes in figure.axes[:5])
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = corners
    assert left == x0 == x2 < x1 == x3  # two columns
    assert bottom > y0 == y1 > y2 == y3
    width, height = figure.get_size_inches()
    assert width < 5 * height
    for axes in figure.axes[:5]:
        box = axes.get_position()
        assert box.width * width == pytest.approx(8 * box.height * height, rel=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_labels_do_not_overlap(seed):
    rng = np.random.default_rng(seed)
    image, taken = np.zeros((200, 300, 3), np.uint8), []
    corners = rng.uniform(0, (280, 180), (40, 2))
    shown = 0
    for number, (x, y) in enumerate(corners):
        box = (x, y, x + 40, y + 30)
        drawn = labels.with_free_label(image, box, f"{number} person 98%", (255, 0, 0), taken)
        shown += not np.array_equal(drawn, image)
        assert len(taken) == shown
        image = drawn
    for i, (left, top, right, bottom) in enumerate(taken):
        assert 0 <= left and right <= 300 and 0 <= top and bottom <= 200
        for left2, top2, right2, bottom2 in taken[:i]:
            across = min(right, right2) - max(left, left2)
            down = min(bottom, bottom2) - max(top, top2)
            assert across <= 0 or down <= 0
    assert shown > 15


RENAMED_EXPORTS = {
    "Look": "AttentionQuery",
    "looks_of": "queries_from_instances",
    "look_figure": "attention_figure",
    "panel": "attention_panel",
    "fit": "resize_longest_side",
    "heat_over": "overlay_attention",
    "instances_over": "overlay_instances",
    "box_over": "draw_box",
    "point_over": "draw_point",
    "arrows_over": "draw_arrows",
}


@pytest.mark.parametrize("old, new", RENAMED_EXPORTS.items())
def test_former_exports_warn_with_the_new_name(old, new):
    with pytest.warns(FutureWarning, match=f"attention.{old} is now {new};"):
        assert getattr(attention, old) is getattr(attention, new)


MASK_BLOCK, P3, POINT = "roi_heads.mask_head.nl_mask_fcn2", "backbone.non_local.p3", (50, 30)
MAP, QUERY, KEYS = np.ones((40, 60)), AttentionQuery((30, 20)), [(5, 5, 0.4)]
ORIGIN = np.zeros((1, 2), int)


def roi(recorder: AttentionRecorder, index: int) -> np.ndarray:
    return recorder.roi_boxes(MASK_BLOCK)[index]


def center(recorder: AttentionRecorder, index: int) -> np.ndarray:
    return roi(recorder, index).reshape(2, 2).mean(axis=0)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc) for axes in figure.axes for loc in ("left", "right")]


# Former call, the same call today, and the new names in the warnings; r is a recorder.
RENAMED_CALLS = [
    (lambda r: r.blocks, lambda r: r.block_names, ["block_names"]),
    (lambda r: r.recorded, lambda r: r.recorded_blocks, ["recorded_blocks"]),
    (
        lambda r: r.attention(P3, places=[POINT], image=0, boxes=None, smooth=False),
        lambda r: r.attention_maps(P3, [POINT], interpolate=False),
        ["attention_maps", "queries=", "image_index=", "roi_boxes=", "interpolate="],
    ),
    (
        lambda r: r.strongest(MASK_BLOCK, place=center(r, 1), image=0, box=roi(r, 1)),
        lambda r: r.top_k(MASK_BLOCK, center(r, 1), roi_box=roi(r, 1)),
        ["top_k", "query=", "image_index=", "roi_box="],
    ),
    (
        lambda r: r.rows(P3, places=[POINT], image=0, boxes=None),
        lambda r: r.attention_rows(P3, [POINT]),
        ["attention_rows", "queries=", "image_index=", "roi_boxes="],
    ),
    (
        lambda r: r.regions(MASK_BLOCK, image=0),
        lambda r: r.roi_boxes(MASK_BLOCK),
        ["roi_boxes", "image_index="],
    ),
    (
        lambda r: r.region(MASK_BLOCK, place=center(r, 1), image=0, box=None),
        lambda r: r.roi_index(MASK_BLOCK, center(r, 1)),
        ["roi_index", "query=", "image_index=", "roi_box="],
    ),
    (
        lambda r: r.grid(MASK_BLOCK, image=0, region=1),
        lambda r: r.grid(MASK_BLOCK, roi_index=1),
        ["image_index=", "roi_index="],
    ),
    (
        lambda r: r.weights(MASK_BLOCK, ORIGIN, image=0, region=1),
        lambda r: r.attention_weights(MASK_BLOCK, ORIGIN, roi_index=1),
        ["attention_weights", "image_index=", "roi_index="],
    ),
    (
        lambda r: r.features(MASK_BLOCK, ORIGIN, image=0, region=1),
        lambda r: r.input_and_residual(MASK_BLOCK, ORIGIN, roi_index=1),
        ["input_and_residual", "image_index=", "roi_index="],
    ),
    (
        lambda r: r.grid(P3).coarser(step=2),
        lambda r: r.grid(P3).downsampled(2),
        ["downsampled", "factor="],
    ),
    (lambda r: r.grid(P3).strongest(MAP, 3), lambda r: r.grid(P3).top_k(MAP, 3), ["top_k"]),
    (
        lambda r: r.grid(P3).spread(np.ones((1, 12, 20)), 100, 60, smooth=False),
        lambda r: r.grid(P3).to_image(np.ones((1, 12, 20)), 100, 60, interpolate=False),
        ["to_image", "interpolate="],
    ),
    (
        lambda r: resize_longest_side(GRADIENT, longest=30),
        lambda r: resize_longest_side(GRADIENT, 30),
        ["target_length="],
    ),
    (
        lambda r: overlay_attention(GRADIENT, heat=MAP, limit=2),
        lambda r: overlay_attention(GRADIENT, MAP, vmax=2),
        ["attn_map=", "vmax="],
    ),
    (
        lambda r: draw_arrows(GRADIENT, (30, 20), targets=KEYS),
        lambda r: draw_arrows(GRADIENT, (30, 20), KEYS),
        ["top_keys="],
    ),
    (
        lambda r: attention_panel(GRADIENT, heat=MAP, look=QUERY, targets=KEYS, longest=30),
        lambda r: attention_panel(GRADIENT, MAP, QUERY, KEYS, target_length=30),
        ["attn_map=", "query=", "top_keys=", "target_length="],
    ),
    (
        lambda r: explorer_page(GRADIENT, looks=[], recorder=r, title="", blocks=[P3], index=0),
        lambda r: explorer_page(GRADIENT, [], r, title="", blocks=[P3]),
        ["queries=", "image_index="],
    ),
    (
        lambda r: titles(
            attention_figure(
                GRADIENT,
                looks=[QUERY],
                recorder=r,
                overview=GRADIENT,
                blocks=[P3],
                arrows=1,
                index=0,
            )
        ),
        lambda r: titles(
            attention_figure(GRADIENT, [QUERY], r, overview=GRADIENT, blocks=[P3], num_arrows=1)
        ),
        ["queries=", "num_arrows=", "image_index="],
    ),
]


@pytest.fixture(scope="module")
def recorder(detector) -> AttentionRecorder:
    with torch.no_grad(), AttentionRecorder(detector) as recorder:
        detector(random_inputs((100, 60)))
    return recorder


@pytest.mark.parametrize("old, new, names", RENAMED_CALLS)
def test_former_calls_warn_with_the_new_names(recorder, old, new, names):
    with pytest.warns(FutureWarning) as caught:
        result = old(recorder)
    assert sorted(str(w.message).split(" is now ")[1].split(";")[0] for w in caught) == sorted(
        names
    )
    np.testing.assert_equal(result, new(recorder))


@torch.no_grad()
def test_former_arguments_of_the_detection_figure(detector):
    with AttentionRecorder(detector) as recorder:
        instances = detector(random_inputs((100, 60)))[0]["instances"]
    image = np.zeros((60, 100, 3), np.uint8)
    with pytest.warns(FutureWarning, match="max_detections=") as caught:
        figure = detection_figure(
            image, instances, recorder, count=2, arrows=0, index=0, by_class=True, blocks=[P3]
        )
    assert len(caught) == 4 and len(figure.axes) == 1 + 2 + 1
