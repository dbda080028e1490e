"""The paper's Table 5, R50 + 1 NL, over detectron2's own Mask R-CNN."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from nonlocal_det.modeling import nonlocal_block_factory

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier, model = _zoo.dataloader, _zoo.lr_multiplier, _zoo.model
optimizer, train = _zoo.optimizer, _zoo.train

model.backbone.bottom_up._target_ = "nonlocal_det.modeling.nonlocal_resnet"
model.backbone.bottom_up.positions = ["res4[-2]"]
model.backbone.bottom_up.make_block = L(nonlocal_block_factory)(
    norm="", subsample=True, pool_first=True
)
