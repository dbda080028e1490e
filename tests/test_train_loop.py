"""One optimizer step: micro-batches, precision and state; in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from ddp_gradients import assert_gradients_agree, build_tame, one_step
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from tiny_models import images, zoo_config

from nonlocal_det.engine import GradAccumTrainer, Trainer
from nonlocal_det.layers import NonLocalBase

pytestmark = pytest.mark.numeric

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
# No proposals: the RoIs are the annotated boxes alone, whatever rounding ranks first.
SAME_ROIS = ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 0]
CLIP = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"]


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("steps", [2, 4])
def test_micro_batches_give_the_gradients_and_losses_of_the_batch(norm, steps):
    whole = one_step(norm)
    parts = one_step(norm, steps)
    assert_gradients_agree(parts["gradients"], whole["gradients"])
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)


def test_gradients_of_all_micro_batches_are_clipped_together():
    options = [*CLIP, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-3]
    whole, parts = one_step("", options=options), one_step("", 2, options=options)
    clipped = whole["gradients"]["roi_heads.box_predictor.cls_score.weight"]
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert_gradients_agree(parts["gradients"], whole["gradients"])


def trained(trainer_class, **settings):
    """The weights after two steps on images of two sizes."""
    cfg = zoo_config(MASK)
    model = build_tame(cfg)
    data = [images(cfg, (64, 64), (32, 64))] * 2
    trainer = trainer_class(model, data, torch.optim.SGD(model.parameters(), lr=0.01), **settings)
    trainer.train(0, 2)
    return model.state_dict()


def test_by_default_an_iteration_is_bit_exact_with_detectron2s():
    expected = trained(SimpleTrainer)
    assert all(
        torch.equal(value, expected[name]) for name, value in trained(GradAccumTrainer).items()
    )


@pytest.mark.parametrize(
    ("path", "positions", "options"),
    [
        (MASK, ("res4[-2]", "p3", "mask_head[-1]"), ()),
        (MASK, ("res4[-2]",), ("MODEL.NONLOCAL.NORM", "BN")),
        (MASK, ("res4[-2]",), ("MODEL.NONLOCAL.NORM", "GN")),
        (MASK, ("res4[-2] PAIRWISE=dot_product", "p3 PAIRWISE=concatenation"), ()),
        (MASK, ("res3[0] MECHANISM=global_context", "p4 MECHANISM=disentangled"), ()),
        # After res5, where features are small: this one's sums are cubic in them.
        (MASK, ("res5[0] MECHANISM=compact_generalized", "p4 MECHANISM=windowed"), ()),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", ("res4[-2]", "res5[0]"), ()),
        (
            "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
            ("keypoint_head[1::2]",),
            ("MODEL.ROI_HEADS.NUM_CLASSES", 1),
        ),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ("res4[-2]", "p3"), ()),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", ("res4[-2]",), ()),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", ("res4[-2]",), ()),
    ],
)
def test_bfloat16_on_a_cpu_is_near_float32(path, positions, options):
    """No operator of any kind of model gets a dtype that it does not support."""
    cfg = zoo_config(path, ["MODEL.NONLOCAL.NORM", "", *SAME_ROIS, *options])
    cfg.MODEL.NONLOCAL.POSITIONS = positions
    # No map may be 1 x 1: there torch 2.15's gradient of a strided convolution in bfloat16, such
    # as RetinaNet's p7, reads memory that nothing wrote.
    data, written = images(cfg, (96, 96), (96, 96)), {}
    for precision in (None, torch.bfloat16):
        model = build_tame(cfg)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        step = GradAccumTrainer(model, [data], optimizer, precision=precision)
        torch.manual_seed(1)
        with EventStorage() as storage:
            step.run_step()
        written[precision] = {n: v for n, (v, _) in storage.latest().items() if "loss_" in n}
        grads = [p.grad for n, p in model.named_parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
        for name, block in model.named_modules():
            assert not isinstance(block, NonLocalBase) or block.out.weight.grad.any(), name
    # A rounding is up to 1/256; the worst loss, a sum of small differences, is 1/100 off.
    assert written[torch.bfloat16] == pytest.approx(written[None], rel=0.05)
    assert written[torch.bfloat16] != written[None]


def test_pooling_does_not_round_boxes():
    """bfloat16 would round 801.5 to 800, a tenth of a bin here."""
    cfg = zoo_config(MASK)
    model = build_tame(cfg)
    generator = torch.Generator().manual_seed(0)
    features = [torch.rand(1, 32, 256 >> i, 256 >> i, generator=generator) for i in range(4)]
    features = [x.bfloat16() for x in features]
    boxes = [Boxes(torch.tensor([[801.5, 30.3, 1000.9, 410.7], [3.3, 5.1, 40.7, 61.9]]))]
    pooler = model.roi_heads.box_pooler
    expected = pooler([x.float() for x in features], boxes)
    GradAccumTrainer(
        model, [], torch.optim.SGD(model.parameters(), lr=0.1), precision=torch.bfloat16
    )
    assert isinstance(pooler, ROIPooler)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooler(features, boxes), expected)


def float16_step(scale):
    """An iteration as on a GPU; the same code runs on a CPU, though no config allows it."""
    cfg = zoo_config(MASK)
    model = build_tame(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = images(cfg, (64, 64), (64, 64))
    step = GradAccumTrainer(model, [data], optimizer, accumulation_steps=2, precision=torch.float16)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    with EventStorage():
        step.run_step()
    return before, step


def test_float16_gradients_are_scaled_and_unscaled():
    before, step = float16_step(2.0**8)
    after = step.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert "roi_heads.mask_head.predictor.weight" in moved
    name = "roi_heads.box_predictor.cls_score.bias"
    one = (after[name] - before[name]).norm()
    _, step = float16_step(2.0**4)
    other = (step.model.state_dict()[name] - before[name]).norm()
    torch.testing.assert_close(one, other, rtol=1e-2, atol=0)


def test_float16_that_overflows_changes_the_scale_and_no_weight():
    before, step = float16_step(2.0**60)
    after = step.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert step.grad_scaler.get_scale() == 2.0**59
    _, other = float16_step(2.0**8)
    other.load_state_dict(step.state_dict())
    assert other.grad_scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("first", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [None, torch.bfloat16, torch.float16])
def test_a_run_resumes_in_another_precision(first, second):
    def step(precision):
        model = torch.nn.Linear(1, 1)
        return GradAccumTrainer(
            model, [], torch.optim.SGD(model.parameters(), lr=0.1), precision=precision
        )

    step(second).load_state_dict(step(first).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_detector_learns_on_a_cpu(precision):
    cfg = zoo_config(MASK, SAME_ROIS)
    cfg.MODEL.NONLOCAL.POSITIONS = ("res4[-2]",)
    data = images(cfg, (64, 64), (64, 64))
    model = build_tame(cfg)
    # A tenth of the rate at which it diverges.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0005, momentum=0.9)
    step = GradAccumTrainer(
        model, [data] * 20, optimizer, accumulation_steps=2, precision=precision
    )
    losses = Losses()
    step.register_hooks([losses])
    torch.manual_seed(1)
    step.train(0, 20)
    assert sum(losses.seen[-5:]) / 5 < 0.7 * losses.seen[0]


class Losses(HookBase):
    """Keeps each iteration's loss."""

    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append(self.trainer.storage.history("total_loss").latest())


def test_nothing_is_evaluated_after_an_error():
    """Not even when the last iteration fails, as detectron2 does: other processes would wait."""
    evaluated = []

    def broken():
        yield from ()
        raise OSError("an image cannot be read")

    model = torch.nn.Linear(1, 1)
    step = GradAccumTrainer(model, broken(), torch.optim.SGD(model.parameters(), lr=0.1))
    step.register_hooks([hooks.EvalHook(0, lambda: evaluated.append(1) or {})])
    with pytest.raises(OSError, match="cannot be read"):
        step.train(0, 1)
    assert not evaluated


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_biases_have_their_own_learning_rate(optimizer):
    options = ["SOLVER.OPTIMIZER", optimizer, "SOLVER.BASE_LR", 0.25, "SOLVER.BIAS_LR_FACTOR", 2.0]
    model = torch.nn.Linear(2, 2)
    built = Trainer.build_optimizer(zoo_config(MASK, options), model)
    rates = {id(group["params"][0]): group["lr"] for group in built.param_groups}
    assert (rates[id(model.weight)], rates[id(model.bias)]) == (0.25, 0.5)
