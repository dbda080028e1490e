"""The recorder against dense float64 sums and hand-made pictures, and the drawing.

Each of these was broken by hand, and a test failed: x and y flipped; a map half a cell, or half a
pixel, off; padding not cropped; queries counted without padding; subsampling forgotten; the scale
of resizing inverted; a stride that is no power of two; the padded size unknown; boxes of regions
not copied, not scaled, or the first image's for all; another region, or the largest; hooks left
behind; the strongest without magnitude; a box ignored; NaN painted; the colours of signs swapped;
arrows turned round.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config_file
from detectron2.modeling import Backbone, build_model
from detectron2.structures import ImageList

from nonlocal_det import NonLocalBlock, add_nonlocal_config
from nonlocal_det.attention import (
    AttentionRecorder,
    attention_panel,
    detection_figure,
    draw_arrows,
    draw_box,
    overlay_attention,
)
from nonlocal_det.attention.figure import AttentionQuery
from nonlocal_det.attention.geometry import image_grid
from nonlocal_det.layers import MECHANISMS, PAIRWISE
from nonlocal_det.utils.plotting import save_figure

STRIDE = 8


class Averages(Backbone):
    """Cells hold the mean colour of their pixels, and a block looks at them."""

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
        images = [entry["image"] for entry in inputs]
        return self.backbone(ImageList.from_tensors(images, 32).tensor)["features"]


def spot_seeker(**settings) -> NonLocalBlock:
    """A block whose every position looks at the brightest one."""
    block = NonLocalBlock(3, inner_channels=1, **settings)
    for name, weight, bias in (("theta", 0.0, 1.0), ("phi", 1.0, 0.0)):
        conv = getattr(block, name)
        nn.init.constant_(conv.weight, weight)
        nn.init.constant_(conv.bias, bias)
    return block.eval()


def entry(image: np.ndarray, resized: tuple[int, int]) -> dict:
    """What a model takes for a float image (H, W), resized by repeating pixels."""
    height, width = image.shape
    columns = ((np.arange(resized[0]) + 0.5) * width / resized[0]).astype(int)
    rows = ((np.arange(resized[1]) + 0.5) * height / resized[1]).astype(int)
    grey = torch.as_tensor(image[np.ix_(rows, columns)], dtype=torch.float32)
    return {"image": grey.expand(3, -1, -1).clone(), "height": height, "width": width}


def spot_at(x: int, y: int, width: int, height: int) -> np.ndarray:
    image = np.zeros((height, width))
    image[y - 1 : y + 2, x - 1 : x + 2] = 1000.0
    return image


# (width, height) before and after resizing, and the pixel of the spot, the centre of a cell: cells
# are 5 pixels wide and high in the first four cases, 20 in the next, 10 in the last.
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
    other = entry(np.zeros((200, 200)), (200, 200))
    image = entry(spot_at(*spot, *original), resized)
    for batch, index in (([image], 0), ([other, image], 1)):
        with AttentionRecorder(model) as recorder:
            model(batch)
        maps = recorder.attention_maps("backbone.nl", [(1, 1), (30.5, 20)], image=index)
        assert maps.shape == (2, original[1], original[0])
        for heat in maps:
            y, x = np.argwhere(heat == heat.max()).mean(axis=0)
            assert abs(x - spot[0]) <= 1 and abs(y - spot[1]) <= 1
        strongest = recorder.strongest("backbone.nl", (1, 1), 3, image=index)
        x, y, weight = strongest[0]
        assert abs(x - spot[0] - 0.5) <= 1 and abs(y - spot[1] - 0.5) <= 1
        assert weight > 0.99 and len(strongest) == 3
        cells = recorder.attention_maps("backbone.nl", [(1, 1)], image=index, smooth=False)
        assert cells.max() == np.float32(weight)


def dense_row(block: NonLocalBlock, x: torch.Tensor, row: int, column: int) -> np.ndarray:
    """The weights of one query of x (1, C, H, W) by the paper's equations, in float64."""
    block, x = copy.deepcopy(block).double(), x.double()
    asking, asked = (x, x) if block.pairwise == "gaussian" else (block.theta(x), block.phi(x))
    theta = asking[0, :, row, column]
    phi = F.max_pool2d(asked, block.stride, ceil_mode=True)[0]
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
def test_map_is_the_dense_row_with_the_geometry_undone(pairwise, subsample):
    torch.manual_seed(0)
    block = NonLocalBlock(3, pairwise=pairwise, inner_channels=2, subsample=subsample).eval()
    model, rng = Detector(block), np.random.default_rng(0)
    # 100 x 60 becomes 160 x 96, of 20 x 12 cells; the batch is 192 x 128, of 24 x 16 cells.
    image = entry(rng.random((60, 100)), (160, 96))
    inputs = [entry(rng.random((128, 192)), (192, 128)), image]
    with AttentionRecorder(model) as recorder:
        model(inputs)
    heat = recorder.attention_maps("backbone.nl", [(33.2, 41.9)], image=1, smooth=False)[0]

    batch = ImageList.from_tensors([entry["image"] for entry in inputs], 32).tensor
    # x = 33.2 is 53.1 resized, in column 6; y = 41.9 is 67.0 resized, in row 8.
    row = dense_row(block, F.avg_pool2d(batch, 8)[1:], row=8, column=6)
    cell = 8 * block.stride
    for y in range(60):
        for x in range(100):
            expected = row[int((y + 0.5) * 1.6 // cell), int((x + 0.5) * 1.6 // cell)]
            assert heat[y, x] == pytest.approx(expected, rel=1e-4, abs=1e-7)

    # The smooth map keeps the weights at the centres: pixels 2, 7, 12 ... of cells of 5 pixels.
    if block.stride == 1:
        smooth = recorder.attention_maps("backbone.nl", [(33.2, 41.9)], image=1)[0]
        np.testing.assert_allclose(smooth[2::5, 2::5], row[:12, :20], rtol=1e-4, atol=1e-7)


def test_strongest_are_the_largest_by_magnitude():
    grid = image_grid((2, 2), padded=(32, 32), resized=(30, 20), original=(60, 40))
    # Cells of 32 pixels, of which the last ones show 28 and 8.
    found = grid.strongest(np.array([[0.1, -0.9], [0.5, 0.0]]), 3)
    assert found == [(46, 16, -0.9), (16, 36, 0.5), (16, 16, 0.1)]


def test_smooth_map_is_linear_between_centres_and_flat_beyond():
    model = Detector(spot_seeker())
    with AttentionRecorder(model) as recorder:
        model([entry(np.zeros((8, 24)), (24, 8))])
    grid = recorder.grid("backbone.nl")
    assert (grid.columns, grid.rows) == (3, 1)
    line = grid.spread(np.array([[[0.0, 16.0, 0.0]]]), 24, 8)[0, 3]
    # The centres lie between pixels 3 and 4, 11 and 12, 19 and 20; a pixel's centre is at + 0.5.
    assert line[:5].tolist() == [0, 0, 0, 0, 1]
    assert line[10:14].tolist() == [13, 15, 15, 13]
    assert line[-5:].tolist() == [1, 0, 0, 0, 0]


def mask_rcnn(positions: tuple[str, ...], *options: object) -> nn.Module:
    """A small Mask R-CNN whose proposals, and so detections, are its anchors."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.merge_from_list(
        ["DEVICE", "cpu", "WEIGHTS", "", "RESNETS.DEPTH", 18, "RESNETS.RES2_OUT_CHANNELS", 64]
        + ["BACKBONE.NAME", "build_nonlocal_resnet_fpn_backbone"]
        + ["ROI_MASK_HEAD.NAME", "NonLocalMaskRCNNConvUpsampleHead"]
        + ["FPN.OUT_CHANNELS", 32, "ROI_BOX_HEAD.FC_DIM", 64, "ROI_MASK_HEAD.CONV_DIM", 32]
        + ["RPN.POST_NMS_TOPK_TEST", 20, "ROI_HEADS.SCORE_THRESH_TEST", 0.0]
        + ["NONLOCAL.POSITIONS", positions]
    )
    cfg.TEST.DETECTIONS_PER_IMAGE = 4
    cfg.merge_from_list(list(options))
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    nn.init.zeros_(model.proposal_generator.rpn_head.anchor_deltas.weight)
    nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.weight)
    return model


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return mask_rcnn(("res4[-2]", "p3", "mask_head[1]"))


def pictures(*sizes: tuple[int, int]) -> list[dict]:
    """Random images, given as (width, height), and resized by 1.6."""
    rng = np.random.default_rng(1)
    return [
        entry(rng.random((height, width)) * 255, (int(width * 1.6), int(height * 1.6)))
        for width, height in sizes
    ]


def test_names_are_those_of_the_modules(detector):
    assert AttentionRecorder(detector).blocks == [
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
    inputs = pictures((100, 60), (80, 80))
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
def test_only_the_rows_asked_for_are_computed(detector, monkeypatch):
    block = detector.backbone.non_local["p3"]
    asked = []

    def attention(x, queries, mask=None):
        asked.append((len(x), queries.tolist()))
        return NonLocalBlock.attention_weights(block, x, queries, mask)

    monkeypatch.setattr(block, "attention_weights", attention)
    with AttentionRecorder(detector) as recorder:
        detector(pictures((100, 60), (80, 80)))
    assert asked == []
    # Cells are 8 / 1.6 = 5 pixels; the batch is 160 x 128, of 20 cells a row.
    recorder.attention_maps("backbone.non_local.p3", [(0, 0), (99.9, 12)], image=0)
    assert asked == [(1, [0, 2 * 20 + 19])]


@torch.no_grad()
def test_box_is_the_mean_of_its_cells(detector):
    with AttentionRecorder(detector) as recorder:
        detector(pictures((100, 60)))
    name = "backbone.non_local.p3"
    # The centres of 3 x 2 cells of 5 pixels lie in the box; no centre lies in the second one.
    box, small = (10, 20, 25, 30), (31, 31, 32, 32)
    points = [(x, y) for y in (22, 27) for x in (12, 17, 22)]
    heat = recorder.attention_maps(name, [box, small])
    expected = recorder.attention_maps(name, points).mean(axis=0)
    np.testing.assert_allclose(heat[0], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(heat[1], recorder.attention_maps(name, [(31.5, 31.5)])[0])


@torch.no_grad()
def test_map_of_a_block_in_a_head_lies_in_the_region_of_its_detection(detector):
    name, block = "roi_heads.mask_head.nl_mask_fcn2", detector.roi_heads.mask_head.nl_mask_fcn2
    inputs, seen = pictures((100, 60), (80, 80)), []
    handle = block.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    with AttentionRecorder(detector) as recorder:
        outputs = detector(inputs)
    handle.remove()
    first, second = (output["instances"] for output in outputs)
    assert len(seen[0]) == len(first) + len(second) and len(second) >= 2
    for index, box in enumerate(second.pred_boxes.tensor.double().numpy()):
        x0, y0, x1, y1 = box
        place = (x0 + (x1 - x0) * 0.3, y0 + (y1 - y0) * 0.6)
        heat = recorder.attention_maps(name, [place], image=1, boxes=[box], smooth=False)[0]
        # 0.3 and 0.6 of 14 cells are the cells 4 and 8.
        row = dense_row(block, seen[0][[len(first) + index]], row=8, column=4)
        for y in range(80):
            for x in range(80):
                u, v = (x + 0.5 - x0) / (x1 - x0) * 14, (y + 0.5 - y0) / (y1 - y0) * 14
                if 1e-3 < u < 13.999 and 1e-3 < v < 13.999 and min(u % 1, v % 1) > 1e-3:
                    assert heat[y, x] == pytest.approx(row[int(v), int(u)], rel=1e-3, abs=1e-6)
                if u < -1e-3 or v < -1e-3 or u > 14.001 or v > 14.001:
                    assert np.isnan(heat[y, x])
        # The arrows stay inside as well.
        for x, y, _ in recorder.strongest(name, place, 5, image=1, box=box):
            assert x0 <= x <= x1 and y0 <= y <= y1


@torch.no_grad()
def test_region_without_a_box_is_the_smallest_around_the_point(detector):
    name = "roi_heads.mask_head.nl_mask_fcn2"
    with AttentionRecorder(detector) as recorder:
        detector(pictures((100, 60)))
    regions = recorder.regions(name)
    areas = (regions[:, 2:] - regions[:, :2]).prod(axis=1)
    smallest = regions[areas.argmin()]
    center = (smallest[:2] + smallest[2:]) / 2
    chosen = recorder.attention_maps(name, [center])
    np.testing.assert_array_equal(chosen, recorder.attention_maps(name, [center], boxes=[smallest]))
    assert recorder.regions("backbone.non_local.p3") is None


@torch.no_grad()
def test_c4_heads_are_seen_on_their_detections():
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
        boxes = model(pictures((50, 40)))[0]["instances"].pred_boxes.tensor
    # res5 runs on the proposals, then on the detections: the latter count.
    np.testing.assert_allclose(recorder.regions("roi_heads.res5.nl0"), boxes, atol=1e-3)
    # 7 x 7 pooled cells become 4 x 4 of two each, the last ones half outside.
    grid, width = recorder.grid("roi_heads.res5.nl0", region=0), float(boxes[0, 2] - boxes[0, 0])
    assert grid.columns == grid.rows == 4
    assert grid.cell_width == pytest.approx(width * 2 / 7, rel=1e-4)


def test_model_without_detections_or_blocks():
    model = mask_rcnn(("mask_head[0]",), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.1)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(pictures((100, 60)))
    for name in recorder.recorded:
        assert len(recorder.regions(name)) == 0
        with pytest.raises(ValueError, match="No region"):
            recorder.attention_maps(name, [(1, 1)])
    with AttentionRecorder(nn.Conv2d(3, 3, 1)) as recorder:
        assert recorder.blocks == recorder.recorded == []


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_is_recorded_in_any_network(mechanism):
    torch.manual_seed(0)
    block = MECHANISMS[mechanism](8, inner_channels=4).eval()
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), block)
    x = torch.randn(2, 3, 24, 40)
    with AttentionRecorder(model) as recorder:
        model(x)
    heat = recorder.attention_maps("1", [(39, 1), (0, 23)], image=1, smooth=False)
    features = model[0](x).detach().double()[1:]
    rows = copy.deepcopy(block).double().attention_weights(features, torch.tensor([9, 50]))[0]
    np.testing.assert_allclose(heat[:, 2::4, 2::4], rows.detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "places, error",
    [
        ([(100.1, 5)], r"point \(100.1, 5\) lies outside: x goes from 0 to 100"),
        ([(5, -0.1)], "lies outside"),
        ([(np.nan, 5)], "lies outside"),
        ([(1, 2, 3)], r"must be \(Q, 2\) points"),
    ],
)
def test_bad_places_are_told(places, error):
    with AttentionRecorder(Detector(spot_seeker())) as recorder:
        recorder._model([entry(np.zeros((60, 100)), (100, 60))])
    with pytest.raises(ValueError, match=error):
        recorder.attention_maps("backbone.nl", places)


def test_bad_names_and_images_are_told():
    recorder = AttentionRecorder(Detector(spot_seeker()))
    with pytest.raises(KeyError, match="Recorded: none; call the model inside the context"):
        recorder.attention_maps("backbone.nl", [(1, 1)])
    with recorder:
        recorder._model([entry(np.zeros((60, 100)), (100, 60))])
    with pytest.raises(KeyError, match=r"No block 'res4' was recorded. Recorded: backbone.nl"):
        recorder.attention_maps("res4", [(1, 1)])
    with pytest.raises(IndexError, match="no image 1: the recorded call has 1"):
        recorder.attention_maps("backbone.nl", [(1, 1)], image=1)
    assert recorder.attention_maps("backbone.nl", []).shape == (0, 60, 100)


def test_networks_that_do_not_pad_have_cells_of_a_power_of_two():
    # 75 x 50 pixels are 5 x 4 cells of 16, though 75 / 5 is 15.
    grid = image_grid((5, 4), padded=(75, 50), resized=(75, 50), original=(150, 50))
    assert (grid.cell_width, grid.cell_height) == (32, 16)
    # The last cells reach beyond the picture; their centres are those of the part inside.
    assert grid.centers()[0].tolist() == [16, 48, 80, 112, 139]
    assert grid.centers()[1].tolist() == [8, 24, 40, 49]
    assert grid.cells_at(np.array([[150, 50], [32, 15.9]])).tolist() == [[4, 3], [1, 0]]


GRADIENT = np.tile(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (40, 1, 3))


def test_drawing_leaves_its_input_and_returns_pictures():
    image, heat = GRADIENT.copy(), np.linspace(0, 1, 2400).reshape(40, 60)
    look = AttentionQuery((30, 20), "1 lamp 98%", (10, 5, 50, 35))
    drawn = [
        overlay_attention(image, heat),
        draw_arrows(image, (30, 20), [(5, 5, 0.4), (30, 20, 0.2), (55, 30, 0.1)]),
        draw_box(image, (10, 5, 50, 35), "lamp"),
        draw_box(image, (-5, -5, 70, 50), "a label wider than the picture is itself, by far"),
    ]
    for picture in drawn:
        assert picture.dtype == np.uint8 and picture.shape == image.shape
        assert not np.array_equal(picture, image)
    assert attention_panel(image, heat, look, [(5, 5, 0.4)], longest=300).shape == (200, 300, 3)
    assert np.array_equal(image, GRADIENT)


def test_heat_shows_the_largest_weight_brightest_and_nothing_where_there_is_none():
    heat = np.full((40, 60), np.nan)
    heat[:, 30:] = 0.001
    heat[10, 50] = 0.2
    drawn = overlay_attention(GRADIENT, heat).astype(int)
    # NaN: the picture, with half its colour; it has none.
    np.testing.assert_array_equal(drawn[:, :30], GRADIENT[:, :30])
    brightest = np.unravel_index(drawn.sum(axis=2).argmax(), heat.shape)
    assert brightest == (10, 50)
    # Warm colours for weights above zero, cold ones below.
    signed = overlay_attention(GRADIENT, np.where(np.arange(60) < 30, -1.0, 1.0) * np.ones((40, 1)))
    assert (signed[:, :30, 2] > signed[:, :30, 0]).all()
    assert (signed[:, 30:, 0] > signed[:, 30:, 2]).all()


def test_arrow_points_where_it_should():
    black = np.zeros((100, 200, 3), np.uint8)
    drawn = draw_arrows(black, (40.5, 50.5), [(160.5, 50.5, 1.0)]).sum(axis=2) > 300
    rows, columns = np.nonzero(drawn)
    assert rows.min() + rows.max() == 100
    # From the dot around the start to the tip; the head is wider than the shaft.
    assert 35 <= columns.min() < 40 and columns.max() in (160, 161)
    assert drawn[:, 157].sum() > drawn[:, 100].sum() >= 1


@pytest.mark.parametrize("heat", [np.zeros((1, 1)), np.full((1, 1), np.nan), -np.ones((1, 1))])
def test_one_pixel_is_drawn(heat):
    image = np.array([[[1, 2, 3]]], np.uint8)
    assert (
        attention_panel(
            image, heat, AttentionQuery((0.5, 0.5), "x", (0, 0, 1, 1)), [(0.5, 0.5, 0)]
        ).shape[2]
        == 3
    )


@pytest.mark.parametrize(
    "image, heat",
    [
        (GRADIENT.astype(float), np.zeros((40, 60))),
        (GRADIENT[:, :, 0], np.zeros((40, 60))),
        (GRADIENT[:0], np.zeros((0, 60))),
        (GRADIENT, np.zeros((60, 40))),
    ],
)
def test_pictures_and_maps_that_do_not_fit_are_told(image, heat):
    with pytest.raises(ValueError, match="The (picture|map) is"):
        overlay_attention(image, heat)


@torch.no_grad()
@pytest.mark.parametrize("count, blocks", [(0, None), (1, ["backbone.non_local.p3"]), (4, None)])
def test_figure_has_a_panel_for_each_block_and_detection(detector, tmp_path, count, blocks):
    with AttentionRecorder(detector) as recorder:
        instances = detector(pictures((100, 60)))[0]["instances"]
    image = np.zeros((60, 100, 3), np.uint8)
    figure = detection_figure(image, instances, recorder, count=count, blocks=blocks)
    # The overview, the panels, and a colour bar where there are panels.
    panels = count * len(blocks or recorder.recorded)
    assert len(figure.axes) == 1 + panels + (panels > 0)
    for ending, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        path = tmp_path / "new" / f"figure.{ending}"
        save_figure(figure, str(path))
        assert path.read_bytes().startswith(magic)


@torch.no_grad()
def test_panels_of_a_long_picture_stand_below_each_other(detector):
    with AttentionRecorder(detector) as recorder:
        instances = detector(pictures((400, 50)))[0]["instances"]
    image, block = np.zeros((50, 400, 3), np.uint8), ["backbone.non_local.p3"]
    figure = detection_figure(image, instances, recorder, count=4, blocks=block)
    corners = np.array([axes.get_position().p0 for axes in figure.axes[1:5]])
    assert len(set(corners[:, 0])) == 1 and (np.diff(corners[:, 1]) < 0).all()
    width, height = figure.get_size_inches()
    assert width < 5 * height
    for axes in figure.axes[:5]:
        box = axes.get_position()
        assert box.width * width == pytest.approx(8 * box.height * height, rel=1e-6)
