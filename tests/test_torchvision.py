"""Attention of blocks in torchvision's detectors, whose transform resizes and pads the images.

Mutations tried by hand; each makes at least one test here fail: sizes of the images after resizing
taken for the original ones; width and height exchanged; the batch's size taken for the image's.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

from nonlocal_det import NonLocalBlock, insert_non_local
from nonlocal_det.attention import AttentionRecorder
from nonlocal_det.modeling import register_padding_mask_hooks

SIZES = [(60, 50), (48, 90)]  # height, width


@pytest.fixture(scope="module")
def recorded():
    """A recorder after a call for two images, its blocks in the backbone and in a head, outputs."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=96,
        max_size=160,
        box_score_thresh=0.0,
        box_detections_per_img=3,
        rpn_post_nms_top_n_test=5,
    ).eval()

    def make_block(channels: int) -> NonLocalBlock:
        return NonLocalBlock(channels, norm="", scale=False)

    blocks = [
        *insert_non_local(model, ["backbone.body.layer3[-2]"], make_block),
        *insert_non_local(model, ["roi_heads.mask_head[1]"], make_block),
    ]
    register_padding_mask_hooks(model.backbone)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        outputs = model([torch.rand(3, *size) for size in SIZES])
    return recorder, blocks, outputs


@pytest.mark.parametrize("index", [0, 1])
def test_maps_are_over_the_original_images(recorded, index: int) -> None:
    recorder, (block, _), _ = recorded
    height, width = SIZES[index]
    factor = min(96 / min(height, width), 160 / max(height, width))
    grid = recorder.grid(block, image_index=index)
    assert grid.bounds == (0, 0, width, height)
    # Of 16 pixels of the resized image, whose sides are rounded down.
    assert grid.cell_width == pytest.approx(16 / factor, rel=0.02)
    assert grid.cell_height == pytest.approx(16 / factor, rel=0.02)
    assert grid.columns == math.ceil(math.floor(width * factor) / 16)
    assert grid.rows == math.ceil(math.floor(height * factor) / 16)
    maps = recorder.attention_maps(block, [(20, 20), (width - 1, height - 1)], image_index=index)
    assert maps.shape == (2, height, width) and np.isfinite(maps).all()
    # Padding is not attended to, so that the rest of a row sums to one.
    for weights, _ in recorder.attention_rows(block, [(20, 20)], image_index=index):
        assert weights.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_blocks_in_heads_run_on_the_detections(recorded, index: int) -> None:
    recorder, (_, block), outputs = recorded
    boxes = outputs[index]["boxes"].numpy()
    assert len(boxes) == 3
    np.testing.assert_allclose(recorder.roi_boxes(block, image_index=index), boxes, rtol=1e-4)
    grid = recorder.grid(block, image_index=index, roi_index=1)
    assert (grid.columns, grid.rows) == (14, 14)
    np.testing.assert_allclose(grid.bounds, boxes[1], rtol=1e-4)


def test_the_model_has_no_hooks_afterwards(recorded) -> None:
    recorder, _, _ = recorded
    assert not recorder._model.transform._forward_hooks
    assert not recorder._model.roi_heads.mask_roi_pool._forward_pre_hooks
