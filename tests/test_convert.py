"""Weights of other implementations give the same outputs here.

The references follow the computation of those implementations, in their order of operations and
with their names; the weights are random.

Mutations tried by hand; each makes at least one test here fail:
the bias under BN dropped, or added to the mean; a frozen scale kept from the bias; phi and g
exchanged; timm's scale dropped, or kept from the bias of theta; weight and bias of the layer norm
exchanged.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_near, sensitivity, steps_of_block

from nonlocal_det import NonLocalBlock
from nonlocal_det.checkpoint.convert import (
    convert_alexhex7,
    convert_caffe2,
    convert_mmcv,
    convert_mmcv_context,
    convert_pytorchvideo,
    convert_timm,
    convert_timm_context,
)
from nonlocal_det.layers import GlobalContextBlock

pytestmark = pytest.mark.numeric

C, D = 6, 4
X = torch.randn(2, C, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PAIRWISE = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
WEIGHT_AND_BIAS = ("weight", "bias")


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def conv(name, c_in, c_out, bias=True, dims=2):
    state = {f"{name}.weight": random(c_out, c_in, *[1] * dims)}
    return {**state, f"{name}.bias": random(c_out)} if bias else state


def batch_norm(name, channels):
    return {
        f"{name}.weight": random(channels),
        f"{name}.bias": random(channels),
        f"{name}.running_mean": random(channels),
        f"{name}.running_var": random(channels).abs() + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(3),
    }


def apply_conv(state, name, x):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def apply_batch_norm(state, name, x):
    parts = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{part}"] for part in parts), training=False)


def pairs(pairwise, theta, phi, w_f=None, scale=1.0):
    """The weights (B, N, M) for theta (B, D, N) and phi (B, D, M)."""
    if pairwise == "concatenation":
        n, m = theta.shape[2], phi.shape[2]
        both = torch.cat(
            [theta[:, :, :, None].expand(-1, -1, n, m), phi[:, :, None].expand(-1, -1, n, m)], dim=1
        )
        return torch.einsum("bdnm,d->bnm", both, w_f.flatten()).relu() / m
    logits = torch.einsum("bdn,bdm->bnm", theta, phi)
    return logits / phi.shape[2] if pairwise == "dot_product" else (logits * scale).softmax(dim=2)


def gather(weights, g, like):
    return torch.einsum("bnm,bdm->bdn", weights, g).reshape(len(like), -1, *like.shape[2:])


def loaded(state, **settings):
    block = NonLocalBlock(C, inner_channels=D, **settings).double().eval()
    block.load_state_dict(state)
    return block


def assert_gives(block, expected):
    """Up to rounding, for X."""
    size = sensitivity(lambda block, x: [block(x)], block, X)
    assert_near(block(X), expected, roundings=steps_of_block(X, D), size=size)


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_mmcv(pairwise, norm, sub_sample):
    torch.manual_seed(1)
    at = ".0" if sub_sample else ""
    state = conv(f"g{at}.conv", C, D)
    if pairwise != "gaussian":
        state.update({**conv("theta.conv", C, D), **conv(f"phi{at}.conv", C, D)})
    if pairwise == "concatenation":
        state.update(conv("concat_project.conv", 2 * D, 1, bias=False))
    # Its convolutions have a bias only without a norm.
    state.update(conv("conv_out.conv", D, C, bias=not norm))
    state.update(batch_norm("conv_out.bn", C) if norm else {})

    def pool(x):
        return F.max_pool2d(x, 2) if sub_sample else x

    g = pool(apply_conv(state, f"g{at}.conv", X)).flatten(2)
    theta, phi = X, pool(X)
    if pairwise != "gaussian":
        theta = apply_conv(state, "theta.conv", X)
        phi = pool(apply_conv(state, f"phi{at}.conv", X))
    scale = D**-0.5 if pairwise == "embedded_gaussian" else 1.0
    w_f = state.get("concat_project.conv.weight")
    weights = pairs(pairwise, theta.flatten(2), phi.flatten(2), w_f, scale)
    out = apply_conv(state, "conv_out.conv", gather(weights, g, X))
    expected = X + (apply_batch_norm(state, "conv_out.bn", out) if norm else out)

    scaled = pairwise == "embedded_gaussian"
    settings = {"pairwise": pairwise, "norm": norm, "subsample": sub_sample, "scale": scaled}
    assert_gives(loaded(convert_mmcv(state), **settings), expected)


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("bn_layer", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_alexhex7(pairwise, bn_layer, sub_sample):
    torch.manual_seed(2)
    at = ".0" if sub_sample else ""
    state = conv(f"g{at}", C, D)
    if pairwise != "gaussian":
        state.update({**conv("theta", C, D), **conv(f"phi{at}", C, D)})
    if pairwise == "concatenation":
        state.update(conv("concat_project.0", 2 * D, 1, bias=False))
    out_name = "W.0" if bn_layer else "W"
    state.update(conv(out_name, D, C))
    state.update(batch_norm("W.1", C) if bn_layer else {})

    def pool(x):
        return F.max_pool2d(x, 2) if sub_sample else x

    g = pool(apply_conv(state, f"g{at}", X)).flatten(2)
    theta, phi = X, pool(X)
    if pairwise != "gaussian":
        theta, phi = apply_conv(state, "theta", X), pool(apply_conv(state, f"phi{at}", X))
    w_f = state.get("concat_project.0.weight")
    weights = pairs(pairwise, theta.flatten(2), phi.flatten(2), w_f)
    out = apply_conv(state, out_name, gather(weights, g, X))
    expected = X + (apply_batch_norm(state, "W.1", out) if bn_layer else out)

    settings = {"pairwise": pairwise, "norm": "BN" if bn_layer else "", "subsample": sub_sample}
    settings["scale"] = False
    assert_gives(loaded(convert_alexhex7(state), **settings), expected)


@pytest.mark.parametrize("use_maxpool", [False, True])
@pytest.mark.parametrize("after", ["bn", "affine", "neither"])
@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("no_bias", [False, True])
def test_caffe2(use_maxpool, after, use_softmax, no_bias):
    torch.manual_seed(3)
    blobs = {"conv1_w": random(2, 2), "nonlocal_conv4_4_theta_w_momentum": random(1)}
    for part, c_in, c_out in (("theta", C, D), ("phi", C, D), ("g", C, D), ("out", D, C)):
        blobs[f"nonlocal_conv4_4_{part}_w"] = random(c_out, c_in, 1, 1, 1)
        if not no_bias:
            blobs[f"nonlocal_conv4_4_{part}_b"] = random(c_out)
    if after != "neither":
        blobs.update({"nonlocal_conv4_4_bn_s": random(C), "nonlocal_conv4_4_bn_b": random(C)})
    if after == "bn":
        blobs["nonlocal_conv4_4_bn_rm"] = random(C)
        blobs["nonlocal_conv4_4_bn_riv"] = random(C).abs() + 0.5

    def blob(name):
        return blobs.get(f"nonlocal_conv4_4_{name}")

    def embed(name, x):
        return F.conv2d(x, blob(f"{name}_w").squeeze(-1), blob(f"{name}_b"))

    pooled = F.max_pool2d(X, 2) if use_maxpool else X
    theta, phi, g = embed("theta", X), embed("phi", pooled), embed("g", pooled)
    pairwise = "embedded_gaussian" if use_softmax else "dot_product"
    weights = pairs(pairwise, theta.flatten(2), phi.flatten(2), scale=D**-0.5)
    out = embed("out", gather(weights, g.flatten(2), X))
    if after == "bn":
        statistics = (blob("bn_rm"), blob("bn_riv"), blob("bn_s"), blob("bn_b"))
        out = F.batch_norm(out, *statistics, training=False, eps=1e-5)
    elif after == "affine":
        out = out * blob("bn_s")[:, None, None] + blob("bn_b")[:, None, None]

    arrays = {name: value.numpy() for name, value in blobs.items()}
    state = convert_caffe2(arrays, "nonlocal_conv4_4")
    settings = {"pairwise": pairwise, "norm": "BN" if after == "bn" else "", "scale": use_softmax}
    block = NonLocalBlock(C, inner_channels=D, subsample=use_maxpool, pool_first=True, **settings)
    # Statistics of Caffe2 do not count batches.
    result = block.double().eval().load_state_dict(state, strict=False)
    assert set(result.missing_keys) <= {"norm.num_batches_tracked"} and not result.unexpected_keys
    assert_gives(block, X + out)


def test_caffe2_keeps_three_dimensions():
    blobs = {f"nl_{part}_w": random(D, C, 1, 1, 1) for part in ("theta", "phi", "g")}
    blobs["nl_out_w"] = random(C, D, 1, 1, 1)
    block = NonLocalBlock(C, dims=3, inner_channels=D, scale=False, norm="")
    block.double().load_state_dict(convert_caffe2(blobs, "nl", dims=3))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("instantiation", ["softmax", "dot_product"])
def test_pytorchvideo(instantiation, norm, pool):
    torch.manual_seed(4)
    state = {}
    for part in ("theta", "phi", "g"):
        state.update(conv(f"conv_{part}", C, D, dims=3))
    state.update({**conv("conv_out", D, C, dims=3), **(batch_norm("norm", C) if norm else {})})
    # The image as a clip of one frame.
    image = {name: x.squeeze(-1) if x.dim() > 1 else x for name, x in state.items()}
    pooled = F.max_pool2d(X, 2) if pool else X
    theta = apply_conv(image, "conv_theta", X).flatten(2)
    phi, g = (apply_conv(image, f"conv_{part}", pooled).flatten(2) for part in ("phi", "g"))
    pairwise = "embedded_gaussian" if instantiation == "softmax" else "dot_product"
    weights = pairs(pairwise, theta, phi, scale=D**-0.5)
    out = apply_conv(image, "conv_out", gather(weights, g, X))
    expected = X + (apply_batch_norm(image, "norm", out) if norm else out)

    settings = {"pairwise": pairwise, "norm": norm, "scale": instantiation == "softmax"}
    converted = convert_pytorchvideo(state, dims=2)
    assert_gives(loaded(converted, subsample=pool, pool_first=True, **settings), expected)
    clips = NonLocalBlock(C, dims=3, inner_channels=D, **settings).double().eval()
    clips.load_state_dict(convert_pytorchvideo(state))


@pytest.mark.parametrize("use_scale", [False, True])
def test_timm(use_scale):
    torch.manual_seed(5)
    state = batch_norm("norm", C)
    for name in ("t", "p", "g"):
        state.update(conv(name, C, D))
    state.update(conv("z", D, C))
    t, p, g = (apply_conv(state, name, X).flatten(2) for name in ("t", "p", "g"))
    weights = pairs("embedded_gaussian", t, p, scale=C**-0.5 if use_scale else 1.0)
    out = apply_batch_norm(state, "norm", apply_conv(state, "z", gather(weights, g, X)))
    assert_gives(loaded(convert_timm(state, use_scale), scale=False), X + out)


@pytest.mark.parametrize(
    ("convert", "names", "size"),
    [
        (
            convert_mmcv_context,
            ("conv_mask", "channel_add_conv.0", "channel_add_conv.1", "channel_add_conv.3"),
            (D, 1, 1),
        ),
        (
            convert_timm_context,
            ("conv_attn", "mlp_add.fc1", "mlp_add.norm", "mlp_add.fc2"),
            (D,),
        ),
    ],
)
def test_global_context(convert, names, size):
    """The two differ in their names, and in the size of the layer norm's weights."""
    torch.manual_seed(6)
    mask, first, norm, last = names
    state = {**conv(mask, C, 1), **conv(first, C, D), **conv(last, D, C)}
    state.update({f"{norm}.weight": random(*size), f"{norm}.bias": random(*size)})
    weights = apply_conv(state, mask, X).flatten(1).softmax(dim=1)
    context = torch.einsum("bcn,bn->bc", X.flatten(2), weights)[..., None, None]
    hidden = apply_conv(state, first, context).flatten(1)
    hidden = F.layer_norm(hidden, (D,), *(state[f"{norm}.{x}"].flatten() for x in WEIGHT_AND_BIAS))
    out = apply_conv(state, last, hidden.relu()[..., None, None])

    block = GlobalContextBlock(C, inner_channels=D).double().eval()
    block.load_state_dict(convert(state))
    assert_gives(block, X + out)


@pytest.mark.parametrize(
    ("convert", "said"),
    [
        (lambda: convert_mmcv(conv("theta", C, D)), "'theta.weight' is not a tensor of mmcv's"),
        (lambda: convert_alexhex7(conv("key", C, D)), "'key.weight' is not a tensor of AlexHex7's"),
        (lambda: convert_alexhex7(conv("g", C, D)), "out.weight is missing"),
        (lambda: convert_caffe2({"conv1_w": X}, "nonlocal_conv4_4"), "'nonlocal_conv4_4'"),
        (lambda: convert_caffe2({"nl_color": X}, "nl"), "'color' is not a tensor of the Caffe2"),
        (lambda: convert_timm(conv("theta", C, D)), "'theta.weight' is not a tensor of timm's"),
        (lambda: convert_pytorchvideo(conv("conv_g", C, D)), "out.weight is missing"),
        (lambda: convert_mmcv_context(conv("conv_mask", C, 1)), "w_v1.weight is missing"),
        (lambda: convert_timm_context(conv("mlp_scale.fc1", C, D)), "'mlp_scale.fc1.weight' is"),
    ],
)
def test_names_of_another_module_are_an_error(convert, said):
    with pytest.raises(ValueError, match=said):
        convert()
