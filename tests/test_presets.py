"""How a block's logits are computed, and who decides it: the keys, a preset or the layer.

Mutations tried by hand; each makes at least one test here fail: the preset over a key of its own; a
preset's scale for a form without a softmax; cosines although SCALE is given; a factor of the
cosines that is not limited; the length of a column without its small constant.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch

from nonlocal_det.layers import NonLocalBlock
from nonlocal_det.layers.norms import unit_length
from nonlocal_det.modeling.block_factory import build_block


def logits_of(block) -> str:
    if block.qk_norm:
        return "cosines"
    return "products" if block.scale == 1 else "scaled products"


@pytest.mark.parametrize(
    ("settings", "logits", "std", "pool_first"),
    [
        ({}, "cosines", None, False),
        ({"preset": "paper"}, "products", None, False),
        ({"preset": "caffe2"}, "scaled products", 0.01, True),
        ({"preset": "caffe2", "init": "kaiming"}, "scaled products", None, True),
        ({"preset": "caffe2", "pool_first": False}, "scaled products", 0.01, False),
        ({"preset": "paper", "scale": True}, "scaled products", None, False),
        ({"preset": "paper", "qk_norm": True}, "cosines", None, False),
        ({"scale": False}, "products", None, False),
        ({"SCALE": True}, "scaled products", None, False),
    ],
)
def test_a_key_holds_over_the_preset(settings, logits, std, pool_first):
    torch.manual_seed(0)
    block = build_block(64, **settings)
    assert (logits_of(block), block.pool_first) == (logits, pool_first)
    expected = std or math.sqrt(2 / 64)
    assert block.theta.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert isinstance(block.norm, torch.nn.BatchNorm2d)


@pytest.mark.parametrize("preset", ["recommended", "paper", "caffe2"])
@pytest.mark.parametrize(
    "form",
    [
        {"pairwise": "dot_product"},
        {"pairwise": "concatenation"},
        {"mechanism": "compact_generalized"},
        {"mechanism": "global_context"},
    ],
)
def test_presets_leave_forms_without_such_a_softmax_alone(preset, form):
    block = build_block(8, preset=preset, **form)
    assert not getattr(block, "qk_norm", False) and not hasattr(block, "logit_scale")
    assert getattr(block, "scale", False) in (False, 1)
    if form == {"mechanism": "global_context"}:
        assert isinstance(block.norm, torch.nn.Identity)


def test_a_key_that_holds_over_the_preset_is_logged(caplog):
    with caplog.at_level(logging.INFO, "nonlocal_det"):
        build_block(32, preset="caffe2", norm="GN", init="normal")
        build_block(32, preset="caffe2", norm="GN")
    (record,) = caplog.records
    assert record.getMessage() == (
        "MODEL.NONLOCAL.NORM 'GN' holds over that of the preset 'caffe2', 'BN'."
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "authors"}, "PRESET is 'authors'; it must be one of 'recommended', 'paper'"),
        ({"pairwise": "dot_product", "scale": True}, "scale is for the softmax of gaussian or"),
        ({"pairwise": "dot_product", "logit_scale": 8.0}, "logit_scale is for the softmax of"),
        ({"pairwise": "concatenation", "qk_norm": True}, "qk_norm is for products"),
        ({"mechanism": "global_context", "scale": True}, "SCALE is True, but global_context has"),
        ({"mechanism": "compact_generalized", "qk_norm": True}, "QK_NORM is True, but compact_gen"),
        ({"qk_norm": True, "scale": True}, "exclude each other"),
        ({"qk_norm": False, "logit_scale": 8.0}, "set qk_norm"),
        ({"scale": True, "logit_scale": 8.0}, "leave out scale"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5; it must be a number from 1 to 100"),
        ({"logit_scale": "high"}, "logit_scale is 'high'; it must be a number from 1 to 100"),
        ({"scale": "often"}, "scale is 'often'; it must be one of None, False, True"),
    ],
)
def test_contradictions_are_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        build_block(8, **settings)


def test_the_logits_of_cosines_stay_within_their_factor_whatever_the_features():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    for factor, limit in ((16.0, 16.0), (1e4, 100.0)):
        block = NonLocalBlock(8).double()
        with torch.no_grad():
            block.logit_scale.fill_(math.log(factor))
        for size in (1e-2, 1.0, 1e6):
            weights = block.attention_weights(x * size, torch.arange(35)).flatten(2)
            spread = weights.amax(dim=2) / weights.amin(dim=2)
            assert spread.max() <= math.exp(2 * limit)
    # Features far above the small constant: their size does not matter at all.
    small, large = (block.attention_weights(x * s, torch.arange(35)) for s in (1e4, 1e6))
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize("settings", [{}, {"mechanism": "windowed", "num_heads": 4}])
@pytest.mark.parametrize("pairwise", ["gaussian", "embedded_gaussian"])
def test_the_factor_of_the_cosines_starts_at_ten(settings, pairwise):
    torch.manual_seed(0)
    for given, initial in ({}, 10), ({"logit_scale": 7.0}, 7):
        block = build_block(64, pairwise=pairwise, **settings, **given)
        theta = torch.randn(1, block.inner_channels, 40)
        theta, phi = block._compared(theta, theta)
        assert (theta.mT @ phi).amax().item() == pytest.approx(initial, rel=1e-3)


def test_columns_of_zeros_stay_zero_and_get_a_finite_gradient():
    x = torch.zeros(1, 4, 3, dtype=torch.float64, requires_grad=True)
    y = unit_length(x)
    y.sum().backward()
    assert not y.any() and x.grad.abs().max() <= 1e3
    long = unit_length(torch.full((1, 4, 3), 5.0, dtype=torch.float64))
    torch.testing.assert_close(long.norm(dim=1), torch.ones(1, 3, dtype=torch.float64))
