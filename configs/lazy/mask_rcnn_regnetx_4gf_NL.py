"""One block in a backbone other than a ResNet: after the third stage of RegNetX-4GF."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from nonlocal_det.modeling import insert_after_outputs, nonlocal_block_factory

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py")
dataloader, lr_multiplier, model = _zoo.dataloader, _zoo.lr_multiplier, _zoo.model
optimizer, train = _zoo.optimizer, _zoo.train

model.backbone.in_features = ["s1", "s2", "s3", "s4"]
model.backbone.bottom_up = L(insert_after_outputs)(
    backbone=model.backbone.bottom_up,
    positions=["s3"],
    make_block=L(nonlocal_block_factory)(norm="", subsample=True, pool_first=True),
)
