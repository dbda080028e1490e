"""GCNet: a global context block after every residual block of res3 to res5, ratio 16."""

from .mask_rcnn_R50_NL import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.bottom_up.positions = ["res3[:]", "res4[:]", "res5[:]"]
model.backbone.bottom_up.make_block.update(mechanism="global_context", reduction=16)
