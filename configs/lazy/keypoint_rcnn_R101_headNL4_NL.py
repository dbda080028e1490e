"""The paper's Table 6, R101 + 4 NL in the head and 1 in the backbone."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from nonlocal_det.modeling import nonlocal_block_factory

_zoo = model_zoo.get_config("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier, model = _zoo.dataloader, _zoo.lr_multiplier, _zoo.model
optimizer, train = _zoo.optimizer, _zoo.train

model.backbone.bottom_up._target_ = "nonlocal_det.modeling.nonlocal_resnet"
model.backbone.bottom_up.stages.depth = 101
model.backbone.bottom_up.positions = ["res4[-2]"]
model.backbone.bottom_up.make_block = L(nonlocal_block_factory)(
    norm="", subsample=True, pool_first=True
)
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"

model.roi_heads.keypoint_head._target_ = (
    "nonlocal_det.modeling.heads.NonLocalKRCNNConvDeconvUpsampleHead"
)
model.roi_heads.keypoint_head.positions = ["keypoint_head[1::2]"]
model.roi_heads.keypoint_head.make_block = L(nonlocal_block_factory)(norm="")
