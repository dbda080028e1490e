"""One iteration of a real detector with blocks, in as many processes as this script runs in.

    torchrun --nproc_per_node 2 tests/ddp_gradients.py OUTPUT NORM:ACCUMULATION_STEPS:PRECISION ...

The math allows equality with one process and one micro-batch: every anchor is sampled and becomes
a proposal, none of which is suppressed, and only the annotated boxes themselves match. So all
images have as many samples of each kind, and the mean over a micro-batch has its weight.

In float64, where no PRECISION is given: RoIs are so alike inside that the gradients of their
block's embeddings are small differences, of which float32's rounding can be a thousandth.
"""

from __future__ import annotations

import detectron2.utils.comm as comm
import torch
from detectron2.engine import default_argument_parser
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_models import OURS, images, in_float64, renamed, wake, zoo_config

from nonlocal_det.engine import GradAccumTrainer, Trainer, launch, wrap_ddp

NUM_IMAGES = 4
ALL_ALIKE = [
    *("MODEL.RPN.NMS_THRESH", 1.0, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.999]),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 4096, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 4096),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4096, "SOLVER.BASE_LR", 0.1),
]


def one_step(norm, accumulation_steps=1, precision=None, options=()):
    """Gradients, norms' statistics and losses, with this process's share of the images."""
    cfg = zoo_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", ALL_ALIKE)
    cfg.MODEL.NONLOCAL.POSITIONS = ("res4[-2]", "p3", "mask_head[-1]")
    cfg.MODEL.NONLOCAL.NORM = norm
    cfg.merge_from_list(list(options))
    model = build_tame(cfg) if precision else in_float64(build_tame(cfg))
    each = NUM_IMAGES // comm.get_world_size()
    mine = images(cfg, *[(64, 64)] * NUM_IMAGES)[comm.get_rank() * each :][:each]
    model = wrap_ddp(model, broadcast_buffers=False)
    step = GradAccumTrainer(
        model,
        [mine],
        Trainer.build_optimizer(cfg, model),
        accumulation_steps=accumulation_steps,
        precision=precision,
    )
    plain = getattr(model, "module", model)
    with EventStorage() as storage:
        step.run_step()
    return {
        "gradients": {n: p.grad for n, p in plain.named_parameters() if p.grad is not None},
        "statistics": {n: b for n, b in plain.named_buffers() if n.endswith("norm.running_mean")},
        "losses": {n: value for n, (value, _) in storage.latest().items() if "loss" in n},
    }


def build_tame(cfg):
    """Always the same: blocks that add something, features that no residual block makes grow."""
    torch.manual_seed(0)
    model = build_model(renamed(cfg, OURS))
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.mul_(0.5)
    wake(model)
    return model


def assert_gradients_agree(given, expected, tolerance=1e-9):
    """In norm: all together, and those of each block. Some of a block's are zero in truth."""
    assert given.keys() == expected.keys()
    assert distance(given, expected) < tolerance
    for block in ("res4.nl4.", "non_local.p3.", "mask_head.nl_mask_fcn4."):
        names = [name for name in expected if block in name]
        assert len(names) >= 6
        assert distance(given, {name: expected[name] for name in names}) < tolerance, block


def distance(given, expected):
    """Between two sets of tensors, relative to the second."""
    error = sum((given[name] - value).double().square().sum() for name, value in expected.items())
    return (error / sum(value.double().square().sum() for value in expected.values())).sqrt().item()


def main(args):
    output, *cases = args.opts
    done = {}
    for case in cases:
        norm, steps, precision = case.split(":")
        done[case] = one_step(norm, int(steps), getattr(torch, precision) if precision else None)
    if comm.is_main_process():
        torch.save(done, output)


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args(), lambda: "cpu")
