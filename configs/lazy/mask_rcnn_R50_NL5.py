"""The paper's 5-block layout: after every other residual block of res3 and res4."""

from .mask_rcnn_R50_NL import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.positions = ["res3[1::2]", "res4[1::2]"]
