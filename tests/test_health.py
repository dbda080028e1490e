"""Health of the blocks in training: what is logged, when, and that training does not notice.

Mutations tried by hand; each makes at least one test here fail: a new block that is dead at once,
or none ever; warnings of frozen blocks; each threshold; any of the measured iterations left out, or
all measured; hooks left after a step, or after one that failed; the latest call instead of the
first; entropy relative to all keys, or to those with a weight, or without a softmax; the call's
mask ignored; no care for no RoIs; torch's random numbers used; the block run again; errors that end
the run; NaN as a scalar; a trainer without the hook, or with it after the checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from ddp_gradients import build_tame
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.engine import HookBase
from tiny_models import blocks_of, images, zoo_config
from torch import nn

from nonlocal_det.attention.recording.block_health import BlockHealth, HealthMeter, block_health
from nonlocal_det.engine import GradAccumTrainer, Trainer
from nonlocal_det.engine.health import HealthHook, _problems
from nonlocal_det.engine.lazy_trainer import LazyTrainer
from nonlocal_det.layers import (
    CompactGeneralizedNonLocalBlock,
    DisentangledNonLocalBlock,
    GlobalContextBlock,
    NonLocalBlock,
    WindowedNonLocalBlock,
)
from nonlocal_det.layers.pixel_mask import call_with_pixel_mask

ROOT = Path(__file__).resolve().parent.parent
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level(logging.INFO, "detectron2")
    return caplog


def warnings_in(log):
    return [r.getMessage() for r in log.records if r.levelno >= logging.WARNING]


class Network(nn.Module):
    """A convolution and a block, whose loss is that of a detector's form."""

    def __init__(self, block=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.block = block or NonLocalBlock(8, scale=False, norm="", init="normal")
        self.failing = False

    def forward(self, batch):
        z = self.block(self.features(batch))
        if self.failing:
            raise OSError("an image cannot be read")
        return {"loss": (z - 1).square().mean()}

    def features(self, batch):
        return self.conv(torch.stack([image["image"] for image in batch]))


def batches(count, size=(9, 7)):
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(count, 2, 3, *size, generator=generator)
    return [[{"image": image} for image in pair] for pair in pairs]


def awake(model, std=0.05):
    """A model whose block adds a little."""
    nn.init.normal_(model.block.out.weight, std=std)
    return model


def train(model, start, stop, *hooks, data=None, **settings):
    """Train from one iteration to another; return what detectron2's storage has kept."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = data or batches(stop - start)
    trainer = GradAccumTrainer(model, data, optimizer, **settings)
    trainer.register_hooks(hooks)
    trainer.train(start, stop)
    return {name: h.values() for name, h in trainer.storage.histories().items() if "health" in name}


def scale(module, factor):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


def saturate(model):
    nn.init.normal_(model.block.theta.weight, std=100)
    nn.init.normal_(model.block.phi.weight, std=100)


STATES = {
    "healthy": (lambda model: None, None),
    "dead": (lambda model: scale(model.block.out, 0), "is dead: "),
    "saturated": (saturate, "is saturated: "),
    "blows up": (lambda model: scale(model.block.out, 1e5), "blows up: "),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("iteration", [100, 1000])
def test_each_state_has_its_own_warning(state, iteration, log):
    change, expected = STATES[state]
    model = awake(Network())
    change(model)
    train(model, iteration - 1, iteration, HealthHook(5000))
    assert f"Blocks at iteration {iteration}: block adds " in log.text
    found = warnings_in(log)
    assert len(found) == (expected is not None)
    assert not found or found[0].startswith(f"block {expected}")


def test_a_new_block_is_dead_only_from_iteration_100_on_and_a_frozen_one_never(log):
    train(Network(), 98, 99, HealthHook(1))
    assert "block adds 0 of its input" in log.text
    model = Network()
    model.block.freeze()
    train(model, 99, 100, HealthHook(1))
    assert not warnings_in(log)


@pytest.mark.parametrize(
    ("start", "stop", "expected"), [(95, 125, [99, 122, 124]), (997, 1002, [999, 1001])]
)
def test_scalars_are_of_the_measured_iterations(start, stop, expected, log):
    """Iterations 100 and 1000, each checkpoint's and the last."""
    written = train(awake(Network()), start, stop, HealthHook(41))
    assert sorted(written) == ["health/block/entropy", "health/block/residual_ratio"]
    for values in written.values():
        assert [at for _, at in values] == expected
        assert all(0 < value < 1.1 for value, _ in values)
    assert log.text.count("Blocks at iteration ") == len(expected)


def test_of_several_calls_the_first_is_measured():
    """Here of the first micro-batch."""
    (batch,) = batches(1)
    model = awake(Network())
    expected = train(model, 99, 100, HealthHook(1), data=[batch[:1]])
    model = awake(Network())
    found = train(model, 99, 100, HealthHook(1), data=[batch], accumulation_steps=2)
    assert found == expected


def test_values_are_those_of_the_definition():
    torch.manual_seed(0)
    block = WindowedNonLocalBlock(8, window_size=3, norm="")
    nn.init.normal_(block.out.weight)
    x = torch.randn(2, 8, 4, 5)
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    mask[0, :, 4] = False
    z = block(x, mask)
    health = block_health(block, x, z, mask)
    valid = mask[0].flatten()
    inputs, added = x[0].flatten(1)[:, valid], (z - x)[0].flatten(1)[:, valid]
    assert health.residual_ratio == pytest.approx((added.norm() / inputs.norm()).item(), rel=1e-5)
    rows = block.attention_weights(x[:1], valid.nonzero()[:, 0], mask[:1])[0].flatten(1).double()
    column, row = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    window = (column // 3 * 2 + row // 3).flatten()
    keys = ((window[valid, None] == window) & valid).sum(dim=1)
    assert set(keys.tolist()) == {9, 3, 1}
    entropies = -torch.special.xlogy(rows, rows).sum(dim=1)[keys > 1] / keys[keys > 1].log()
    assert health.entropy == pytest.approx(entropies.mean().item(), rel=1e-5)
    assert health.max_weight == pytest.approx(rows.amax(dim=1).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("ratio", "count"), [(2.3, 0), (9.9, 0), (10.1, 1)])
def test_a_block_that_adds_twice_its_input_is_healthy(ratio, count):
    """Blocks without a norm do, and learn."""
    assert len([*_problems(BlockHealth(ratio, math.nan, math.nan, False), 100)]) == count


def test_the_entropy_of_a_single_key_is_zero():
    """Though all other weights underflow."""
    block = NonLocalBlock(8, scale=False)
    scale(block.theta, 1e6)
    x = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    assert block_health(block, x, block(x), None).entropy == pytest.approx(0, abs=1e-3)


UNIFORM = {
    "non_local": lambda: NonLocalBlock(8, subsample=True),
    "gaussian": lambda: NonLocalBlock(8, pairwise="gaussian"),
    "global_context": lambda: GlobalContextBlock(8),
    "disentangled": lambda: DisentangledNonLocalBlock(8, subsample=True, pool_first=True),
    "windowed": lambda: WindowedNonLocalBlock(8, window_size=3, num_heads=2),
}


@pytest.mark.parametrize("kind", UNIFORM)
@pytest.mark.parametrize("masked", [False, True])
def test_the_entropy_of_equal_features_is_uniform(kind, masked):
    """Whatever the keys that a query can attend to."""
    block, x = UNIFORM[kind](), torch.ones(1, 8, 5, 7)
    mask = torch.ones(1, 5, 7, dtype=torch.bool)
    mask[:, :, 3:] = not masked
    assert block_health(block, x, block(x, mask), mask).entropy == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "block",
    [
        NonLocalBlock(8, pairwise="dot_product"),
        NonLocalBlock(8, pairwise="concatenation"),
        CompactGeneralizedNonLocalBlock(8),
    ],
)
def test_without_a_softmax_there_is_no_entropy(block, log):
    for embedding in (block.theta, block.phi):  # without features they are not zero
        embedding.bias = nn.Parameter(torch.ones(block.inner_channels))
    assert list(train(Network(block), 98, 99, HealthHook(1))) == ["health/block/residual_ratio"]
    assert "block adds 0 of its input" in log.text and "entropy" not in log.text


def test_a_zero_input_has_no_ratio():
    block, x = NonLocalBlock(8, norm=""), torch.zeros(1, 8, 3, 3)
    nn.init.ones_(block.out.bias)
    assert math.isnan(block_health(block, x, block(x), None).residual_ratio)


def test_the_padding_mask_of_the_call_holds():
    class Padded(Network):
        def forward(self, batch):
            mask = torch.ones(len(batch), 9, 7, dtype=torch.bool)
            mask[:, :, 4:] = False
            return call_with_pixel_mask(mask, lambda: super(Padded, self).forward(batch))

    model, meter = Padded(), HealthMeter()
    scale(model.block.theta, 0)  # uniform
    meter.attach(model)
    model(batches(1)[0])
    assert meter.detach() and is_clean(model)
    assert meter.found["block"].max_weight == pytest.approx(1 / (9 * 4))


@pytest.mark.parametrize("first", [0, 2])
def test_no_rois(first, log):
    """A block that sees none is left out; one that sees some later is measured then."""

    class Head(Network):
        def forward(self, batch):
            x = self.features(batch)
            return {"loss": self.block(x[:0]).sum() + self.block(x[:first]).square().sum()}

    written = train(awake(Head()), 99, 100, HealthHook(1))
    assert len(written) == first and not warnings_in(log)
    assert ("Blocks at iteration" in log.text) == bool(first)


def yaml_trainer(folder, monkeypatch):
    cfg = zoo_config(MASK, ["OUTPUT_DIR", str(folder), "SOLVER.MAX_ITER", 5, "DATASETS.TEST", ()])
    cfg.MODEL.META_ARCHITECTURE, cfg.SOLVER.CHECKPOINT_PERIOD = "Network", 2
    monkeypatch.setattr(Trainer, "build_model", lambda *_: Network())
    monkeypatch.setattr(Trainer, "build_train_loader", lambda *_: batches(5))
    return Trainer(cfg)


def lazy_trainer(folder, monkeypatch):
    cfg = LazyConfig.load(str(ROOT / "configs" / "lazy" / "mask_rcnn_R50_NL.py"))
    cfg.model, cfg.dataloader.train = L(Network)(), L(batches)(count=5)
    cfg.train.update(
        output_dir=str(folder), max_iter=5, eval_period=0, device="cpu", seed=1, init_checkpoint=""
    )
    cfg.train.update(accumulation_steps=1, checkpointer={"period": 2})
    cfg.train.amp.dtype = "float16"
    monkeypatch.setattr(LazyTrainer, "test", lambda *_: {})
    return LazyTrainer(cfg)


@pytest.mark.parametrize("build", [yaml_trainer, lazy_trainer])
def test_both_trainers_tell_at_each_checkpoint(build, tmp_path, monkeypatch, log):
    trainer = build(tmp_path, monkeypatch)
    trainer.train()
    told = [r.getMessage() for r in log.records if "Blocks at" in r.getMessage()]
    assert [line.split(":")[0] for line in told] == [f"Blocks at iteration {i}" for i in (2, 4, 5)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert rows[-1]["iteration"] == 4 and 0 < rows[-1]["health/block/entropy"] < 1.1
    # Saved with the checkpoint of the iteration: a resumed run can write them.
    saved = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    scalars = saved["trainer"]["hooks"]["ResumeHook"]["scalars"]
    assert [at for _, at in scalars["health/block/entropy"]["values"]] == [1, 3]


def is_clean(model):
    return not any(module._forward_hooks for module in model.modules())


class Watch(HookBase):
    """Sees whether hooks are attached in the step."""

    def before_step(self):
        self.attached = not is_clean(self.trainer.model)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("due", [False, True])
def test_nothing_stays_attached(failing, due):
    model, watch = awake(Network()), Watch()
    model.failing = failing
    try:
        train(model, 99 if due else 50, 100, HealthHook(5000), watch)
    except OSError:
        assert failing
    assert is_clean(model) and watch.attached == (due or not failing)


def test_an_error_here_is_logged_and_ends_nothing(log):
    class Broken(NonLocalBlock):
        def _attention_weights(self, x, queries, mask):
            raise IndexError("of the block")

    assert not train(Network(Broken(8)), 99, 100, HealthHook(1))
    assert "health of block cannot be measured: IndexError: of the block." in log.text


POSITIONS = (
    *("res3[0] MECHANISM=global_context", "res4[-2] SUBSAMPLE=True", "p3 PAIRWISE=dot_product"),
    *("p4 MECHANISM=disentangled", "p5 MECHANISM=windowed WINDOW_SIZE=2 NUM_HEADS=2"),
    "mask_head[-1]",
)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_training_is_the_same_to_the_bit(precision, log):
    """A real detector with batch norms, on padded images, in micro-batches."""
    cfg = zoo_config(MASK, ["MODEL.RESNETS.NORM", "BN", "MODEL.NONLOCAL.POSITIONS", POSITIONS])
    data = [images(cfg, (64, 64), (32, 64), (64, 64), (64, 48))] * 2
    states = []
    for hooks in ((), (HealthHook(1),)):
        model = build_tame(cfg)
        torch.manual_seed(1)
        found = train(model, 0, 2, *hooks, data=data, accumulation_steps=2, precision=precision)
        states.append((model.state_dict(), torch.get_rng_state()))
    assert {name.split("/")[1] for name in found} == set(blocks_of(model)) and len(found) == 11
    assert "cannot be measured" not in log.text
    assert all(torch.equal(states[1][0][name], value) for name, value in states[0][0].items())
    assert torch.equal(states[0][1], states[1][1])
