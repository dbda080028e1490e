"""The mask of a call reaches the blocks of that call: in its thread, and where it is run again.

Changes made by hand, each of which fails a test here: one variable for all threads; the call not
ended after an error; storages not marked, or marked under grad mode alone; what is run again
remembered beyond its backward pass; only stages marked, not their children; the copy without masks;
the mask computed from positional arguments alone; a look at the mask's values on every device.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from test_models import MASK_RCNN
from tiny_models import OURS, blocks_of, renamed, wake, zoo_config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from nonlocal_det.layers import NonLocalBlock
from nonlocal_det.modeling import insert_non_local, padding_mask, register_padding_mask_hooks

pytestmark = pytest.mark.numeric

THREADS, CALLS = 4, 15
WRAPPED = "_checkpoint_wrapped_module."


def detectron2_backbone():
    """An FPN with blocks in its ResNet and after an output, both of which mask padding."""
    cfg = zoo_config(MASK_RCNN)
    cfg.MODEL.NONLOCAL.POSITIONS = ("res3[0]", "res4[-2]", "p3")
    torch.manual_seed(0)
    backbone = build_backbone(renamed(cfg, OURS))
    return backbone, backbone.bottom_up, ("res3", "res4")


def torchvision_backbone():
    """The backbone of torchvision's detectors."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    insert_non_local(backbone, ["body.layer2[0]", "body.layer3[-1]"], NonLocalBlock)
    return register_padding_mask_hooks(backbone), backbone.body, ("layer2", "layer3")


BACKBONES = {"detectron2": detectron2_backbone, "torchvision": torchvision_backbone}


@pytest.fixture(params=BACKBONES)
def built(request):
    """(backbone, the module of its stages, names of two stages with blocks), in float64."""
    backbone, stages, names = BACKBONES[request.param]()
    wake(backbone)
    return backbone.double().eval(), stages, names


def padded(*sizes, seed=0):
    """Images of these sizes (height, width), padded with zeros to a common multiple of 32."""
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes))
    rng = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=rng, dtype=torch.float64)
    return torch.stack([F.pad(random(3, h, w), (0, width - w, 0, height - h)) for h, w in sizes])


BATCHES = (
    padded((40, 60), (64, 33)),
    padded((64, 64), (20, 64), seed=1),
    padded((64, 64), seed=2),  # nothing is padded
    padded((50, 31), (64, 64), seed=3),
)


def features(backbone, batch):
    return torch.cat([level.flatten(1) for level in backbone(batch).values()], dim=1)


def agree(found, expected):
    return (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@torch.no_grad()
def test_each_thread_gets_the_results_of_its_own_batches(built):
    backbone, *_ = built
    alone = [features(backbone, batch) for batch in BATCHES]

    @torch.no_grad()
    def serve(worker):
        order = [(worker + call) % len(BATCHES) for call in range(CALLS)]
        return [agree(features(backbone, BATCHES[i]), alone[i]) for i in order]

    with ThreadPoolExecutor(THREADS) as pool:
        results = [right for worker in pool.map(serve, range(THREADS)) for right in worker]
    assert results == [True] * THREADS * CALLS


@torch.no_grad()
def test_padding_matters_here(built):
    """What the other tests compare would differ without a mask."""
    backbone, stages, _ = built
    masked = backbone(BATCHES[0])
    with mock.patch.object(padding_mask, "valid_pixel_mask", lambda x: x[:, 0].bool() | True):
        unmasked = backbone(BATCHES[0])
    for name, level in masked.items():
        if name in ("p2", "p3", "p4", "0", "1", "2"):
            assert (level - unmasked[name]).abs().max() > 1e-3 * level.abs().max()


# Activation checkpointing.


def rerun_stages(stages, names, run):
    for name in names:
        rerun(getattr(stages, name), run)


def rerun_wrapped_stages(stages, names, run):
    impl = (
        CheckpointImpl.REENTRANT if run.keywords["use_reentrant"] else CheckpointImpl.NO_REENTRANT
    )
    for name in names:
        stage = getattr(stages, name)
        wrapped = checkpoint_wrapper(stage, checkpoint_impl=impl)
        if hasattr(stages, "stages"):  # detectron2's ResNet calls these
            stages.stages[stages.stages.index(stage)] = wrapped
        setattr(stages, name, wrapped)


def rerun_chunks(stages, names, run):
    for name in names:
        stage = getattr(stages, name)
        stage.forward = partial(checkpoint_sequential, list(stage), 2, **run.keywords)


def rerun_blocks(stages, names, run):
    for block in blocks_of(stages).values():
        rerun(block, run)


def rerun(module, run):
    module.forward = partial(run, module.forward)


PARTS = (rerun_stages, rerun_wrapped_stages, rerun_chunks, rerun_blocks)


def gradients(backbone, batches):
    """Of the inputs, and of parameters by name, in one backward pass after calls with all."""
    backbone.zero_grad()
    batches = [batch.clone().requires_grad_() for batch in batches]
    sum(features(backbone, batch).square().mean() for batch in batches).backward()
    named = {name.replace(WRAPPED, ""): p.grad for name, p in backbone.named_parameters()}
    return {**named, **{f"batch {i}": batch.grad for i, batch in enumerate(batches)}}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rerun_part", PARTS)
def test_activation_checkpointing_keeps_the_gradients(built, rerun_part, use_reentrant):
    backbone, stages, names = built
    expected = gradients(backbone, BATCHES[:3])
    rerun_part(stages, names, partial(checkpoint, use_reentrant=use_reentrant))
    assert_same_gradients(gradients(backbone, BATCHES[:3]), expected)


def test_activation_checkpointing_of_all_keeps_the_gradients(built):
    backbone, *_ = built
    expected = gradients(backbone, BATCHES[:2])
    rerun(backbone, partial(checkpoint, use_reentrant=False))
    assert_same_gradients(gradients(backbone, BATCHES[:2]), expected)


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        size = max(gradient.abs().max(), 1e-6 * largest)  # a bias of phi has none in truth
        assert (found[name] - gradient).abs().max() <= 1e-9 * size, name


def test_a_part_that_cannot_know_its_mask_says_so(built):
    """It starts with an operator, so that no module gets features with a known mask."""
    backbone, stages, names = built
    stage = getattr(stages, names[-1])
    forward = stage.forward
    stage.forward = lambda x: checkpoint(lambda x: forward(x + 0), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="NonLocalBlock runs again .* Checkpoint a call of"):
        gradients(backbone, BATCHES[:1])


# Calls.


@torch.no_grad()
def test_images_may_be_a_keyword_argument(built):
    backbone, *_ = built
    for name, level in backbone(BATCHES[0]).items():
        assert torch.equal(backbone(x=BATCHES[0])[name], level)


def test_a_call_without_images_says_what_is_wanted(built):
    backbone, *_ = built
    with pytest.raises(TypeError, match=r"masks padding, so .* \(B, C, H, W\), not with list"):
        backbone([BATCHES[0]])


@torch.no_grad()
def test_after_a_call_blocks_attend_to_all_positions_even_if_it_failed(built):
    backbone, stages, names = built
    block = next(iter(blocks_of(stages).values()))
    x = torch.randn(2, block.channels, 4, 4, dtype=torch.float64)
    alone = block(x)
    backbone(BATCHES[0])
    assert torch.equal(block(x), alone)
    handle = getattr(stages, names[-1]).register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backbone(BATCHES[0])
    assert torch.equal(block(x), alone)
    handle.remove()
    assert block.resolve_mask(x, None) is None


@torch.no_grad()
def test_a_network_in_a_network_has_masks_of_its_own_images(built):
    """As where a model calls another one in between."""
    backbone, stages, names = built
    expected = features(backbone, BATCHES[0])
    others = []
    other = copy.deepcopy(backbone)
    getattr(stages, names[0]).register_forward_pre_hook(
        lambda *_: others.append(features(other, BATCHES[1]))
    )
    assert agree(features(backbone, BATCHES[0]), expected)
    assert agree(others[0], features(other, BATCHES[1]))


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_mask_too(built, copied):
    backbone, *_ = built
    other = copied(backbone)
    assert type(other) is type(backbone)
    assert torch.equal(features(other, BATCHES[0]), features(backbone, BATCHES[0]))


def test_class_and_names_stay():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), NonLocalBlock(4))
    names = list(network.state_dict())
    masked = register_padding_mask_hooks(network)
    assert masked is register_padding_mask_hooks(network) is network
    assert isinstance(network, nn.Sequential) and type(network).__name__ == "Sequential"
    assert list(network.state_dict()) == names
    assert [len(part._forward_pre_hooks) for part in network.modules()][:2] == [1, 1]


def test_no_value_is_read_where_that_would_wait_for_a_gpu(built):
    """On the meta device, any such reading is an error."""
    backbone, *_ = built
    sizes = {name: level.shape for name, level in backbone(BATCHES[0]).items()}
    on_meta = backbone.to("meta")(BATCHES[0].to("meta"))
    assert {name: level.shape for name, level in on_meta.items()} == sizes


def test_function_transforms(built):
    """torch.func's gradients are autograd's, and vmap's results those of each image alone."""
    backbone, *_ = built
    expected = gradients(backbone, BATCHES[:1])
    weights = {name: weight.detach() for name, weight in backbone.named_parameters()}

    def loss(weights, batch):
        levels = torch.func.functional_call(backbone, weights, (batch,))
        return torch.cat([level.flatten(1) for level in levels.values()], dim=1).square().mean()

    found = torch.func.grad(loss)(weights, BATCHES[0])
    for name, gradient in expected.items():
        if name in found and gradient is not None:
            size = max(gradient.abs().max(), 1e-6 * max(g.abs().max() for g in found.values()))
            assert (found[name] - gradient).abs().max() <= 1e-9 * size, name
    each = torch.func.vmap(lambda image: loss(weights, image[None]))(BATCHES[0])
    for value, image in zip(each, BATCHES[0]):
        torch.testing.assert_close(value, loss(weights, image[None]), rtol=1e-9, atol=0)


# Captured: one capture serves images with padding and without.


def compiled(backbone, batch):
    torch._dynamo.reset()
    return torch.compile(backbone, backend="eager", fullgraph=True)


def exported(backbone, batch):
    return torch.export.export(backbone, (batch,), strict=False).module()


@pytest.mark.slow
@pytest.mark.parametrize("capture", [compiled, exported])
def test_captured(built, capture):
    backbone, *_ = built
    with torch.no_grad():
        captured = capture(backbone, BATCHES[2].repeat(2, 1, 1, 1))
        for batch in (BATCHES[0], BATCHES[1], BATCHES[2].repeat(2, 1, 1, 1)):
            assert agree(features(captured, batch), features(backbone, batch))
