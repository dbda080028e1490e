"""Detectors small enough for a test, their inputs, and checks of their outputs."""

from __future__ import annotations

import copy

import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from nonlocal_det import add_nonlocal_config
from nonlocal_det.layers import NonLocalBase

# Our component for each of detectron2's, by their registered names.
OURS = {
    "build_resnet_backbone": "build_nonlocal_resnet_backbone",
    "build_resnet_fpn_backbone": "build_nonlocal_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_nonlocal_retinanet_resnet_fpn_backbone",
    "Res5ROIHeads": "NonLocalRes5ROIHeads",
    "FastRCNNConvFCHead": "NonLocalFastRCNNConvFCHead",
    "MaskRCNNConvUpsampleHead": "NonLocalMaskRCNNConvUpsampleHead",
    "KRCNNConvDeconvUpsampleHead": "NonLocalKRCNNConvDeconvUpsampleHead",
}
STOCK = {ours: theirs for theirs, ours in OURS.items()}
NAMED = ("BACKBONE", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")

# Every anchor is sampled and some boxes are found, whatever the weights: so all levels get
# gradients, and all heads run.
FEW = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.PRE_NMS_TOPK_TEST", 50),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 8, "MODEL.RPN.POST_NMS_TOPK_TEST", 8),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 4),
]
NARROW = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [32] * 8),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CLASSES", 3),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4),
]


def zoo_config(path, options=()):
    """A configuration of detectron2's model zoo, with ``MODEL.NONLOCAL``, tiny, nothing frozen."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(path))
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list([*FEW, *NARROW, *options])
    return cfg


def renamed(cfg, names):
    """A copy with the components of ``cfg`` replaced by name."""
    cfg = cfg.clone()
    for node in NAMED:
        cfg.MODEL[node].NAME = names.get(cfg.MODEL[node].NAME, cfg.MODEL[node].NAME)
    return cfg


def build_pair(cfg):
    """detectron2's own model, and ours with the positions of ``cfg`` and the same weights."""
    torch.manual_seed(0)
    stock = build_model(renamed(cfg, STOCK)).eval()
    for module in stock.modules():
        # Frozen statistics that fit no data would let features grow with every residual block.
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.mul_(0.5)
    model = build_model(renamed(cfg, OURS)).eval()
    model.load_state_dict(stock.state_dict(), strict=False)
    return stock, model


def blocks_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, NonLocalBase)}


def in_float64(model):
    """The same model, with rounding far below what gradients are; in training only."""
    for module in model.double().modules():
        if hasattr(module, "predict_proposals"):
            module.predict_proposals = _in_float32(module.predict_proposals)
    return model


def _in_float32(predict_proposals):
    """NMS takes scores of the dtype of its boxes, which detectron2 has in float32."""
    return lambda anchors, logits, *rest: predict_proposals(
        anchors, [level.float() for level in logits], *rest
    )


def names_without_blocks(model):
    inside = tuple(f"{name}." for name in blocks_of(model))
    return [name for name in model.state_dict() if not (inside and name.startswith(inside))]


def images(cfg, *sizes, instances=2):
    """Inputs of a detector: one per size (height, width), with that many objects on each."""
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for height, width in sizes:
        image = torch.randint(0, 256, (3, height, width), generator=generator).float()
        labels = torch.arange(instances) % cfg.MODEL.ROI_HEADS.NUM_CLASSES
        corner = torch.tensor([[2.0, 3.0], [width / 3, height / 4]])[:instances]
        extent = torch.tensor([[width / 2, height / 2], [width / 2, height / 2]])[:instances]
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        target.gt_classes = labels
        target.gt_masks = BitMasks(_inside(target.gt_boxes.tensor, height, width))
        points = corner[:, None] + extent[:, None] * torch.rand(
            instances, 17, 2, generator=generator
        )
        visible = torch.full((instances, 17, 1), 2.0)
        target.gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
        inputs.append(
            {
                "image": image,
                "height": height,
                "width": width,
                "instances": target,
                "sem_seg": torch.zeros(height, width, dtype=torch.long),
            }
        )
    return inputs


def _inside(boxes, height, width):
    y, x = torch.arange(height)[:, None], torch.arange(width)
    x0, y0, x1, y1 = (side[:, None, None] for side in boxes.unbind(1))
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def losses(model, inputs):
    """The losses of one training step, after the backward pass of their sum."""
    model.train()
    torch.manual_seed(2)
    model.zero_grad()
    with EventStorage():
        result = model(copy.deepcopy(inputs))
    sum(result.values()).backward()
    model.eval()
    return result


def features(model, inputs):
    """The backbone's outputs for the first image."""
    with torch.no_grad():
        return model.backbone(inputs[0]["image"][None] / 64 - 2)


def outputs(model, inputs):
    """All output tensors of a model and its backbone, by name."""
    with torch.no_grad():
        given = {"backbone": features(model, inputs), "all": model(inputs)}
    return dict(_tensors("", given))


def _tensors(name, value):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Boxes):
        yield name, value.tensor
    elif isinstance(value, Instances):
        yield from _tensors(name, value.get_fields())
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}", part)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}.{i}", part)


def assert_same(given, expected):
    """Check that tensors are equal bit for bit, and that there are any."""
    assert given.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name


def wake(model):
    """Give the zero factor of every block a random value, so that it is not the identity."""
    torch.manual_seed(3)
    for block in blocks_of(model).values():
        for tensor in (*block.out.parameters(), *block.norm.parameters()):
            torch.nn.init.normal_(tensor, std=0.02)
