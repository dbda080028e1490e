"""The pairwise functions against their dense definitions.

Changes to the kernels that were made by hand, each of which fails a test here:

- softmax: the inner product with y added in backward instead of subtracted; sums not rescaled when
  the running maximum rises; no floor under the sum of a row without keys; the log-sum-exp without
  its sum; the mask not applied; denormal weights kept; weights cut off too early; the scale left
  out; the mask of rows without keys, the padding to one width, or the exit from autocast left out
  of the fused form; float16 trained in float16
- dot product: masked values kept; masked keys counted; autocast let in
- concatenation: the wrong side of a breakpoint; no ReLU before the first one; 1 / M left out of the
  gaps; a slope given to queries above no key, or to keys below no query; the sign of the keys'
  gradient; infinite gaps of masked keys kept; slope and gap one index apart; masked keys let in
- softmax, dot product: a long sum made one by one, or by `baddbmm` into what is there
- all: the eager implementation taken while being traced or exported; float16 results, or
  gradients, not saturated
"""

import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_near, blocked

from nonlocal_det.layers import hinge_sums, pairwise, tiled_softmax

pytestmark = pytest.mark.numeric

KINDS = ("softmax", "dot_product", "concatenation")
SCALE = 0.7
MANY = 2**18  # positions
exactly_repeated = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def fast(kind, theta, phi, g, mask=None):
    extra = (SCALE,) if kind == "softmax" else ()
    return getattr(pairwise, f"{kind}_attention")(theta, phi, g, mask, *extra)


def weights(kind, theta, phi, mask=None):
    extra = (SCALE,) if kind == "softmax" else ()
    return getattr(pairwise, f"{kind}_weights")(theta, phi, mask, *extra)


def dense(kind, theta, phi, g, mask=None):
    return g @ weights(kind, theta, phi, mask).mT


def make(kind, batch=2, width=3, values=4, queries=20, keys=17, dtype=torch.float64, seed=0):
    """Random theta, phi (or a, b) and g."""
    rng = torch.Generator().manual_seed(seed)
    size = (batch,) if kind == "concatenation" else (batch, width)
    sizes = ((*size, queries), (*size, keys), (batch, values, keys))
    return [torch.randn(s, generator=rng, dtype=dtype).requires_grad_() for s in sizes]


def make_mask(batch, keys, seed=0, empty_rows=0):
    """Two thirds of the keys are valid; in the first rows none."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < 0.67
    mask[:empty_rows] = False
    return mask


def value_and_gradients(function, inputs, seed=0):
    y = function(*inputs)
    rng = torch.Generator().manual_seed(seed)
    toward = torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, toward)]


@torch.no_grad()
def sizes(kind, inputs, toward, mask=None):
    """What the sizes of the terms add up to in y and in the gradients of theta, phi and g."""
    theta, phi, g, toward = (x.double().abs() for x in (*inputs, toward))
    part = torch.ones_like(g[:, :1]) if mask is None else mask.unsqueeze(1).double()
    part = part / part.sum(dim=2, keepdim=True).clamp(min=1)
    pull = toward.mT @ g
    if kind == "softmax":
        shares = weights(kind, *(x.double() for x in inputs[:2]), mask)
        # What a logit is off by, its exponential is off by in proportion.
        shares = shares * (1 + SCALE * (theta.mT @ phi).amax(dim=(1, 2), keepdim=True))
        pull = SCALE * shares * (pull + (toward * (g @ shares.mT)).sum(dim=1).unsqueeze(2))
    elif kind == "dot_product":
        shares, pull = theta.mT @ phi * part, pull * part
    else:
        shares, pull = (theta.unsqueeze(2) + phi.unsqueeze(1)) * part, pull * part
        return g @ shares.mT, pull.sum(dim=2), pull.sum(dim=1), toward @ shares
    return g @ shares.mT, phi @ pull.mT, theta @ pull, toward @ shares


def assert_same(kind, inputs, mask=None, function=None, **tolerance):
    """Values with and without gradients, and the gradients, are the dense ones."""
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-11}
    function = function or fast
    expected = value_and_gradients(lambda *x: dense(kind, *x, mask), inputs)
    found = value_and_gradients(lambda *x: function(kind, *x, mask), inputs)
    with torch.inference_mode():
        found.append(function(kind, *inputs, mask))
    for ours, theirs in zip(found, [*expected, expected[0]]):
        torch.testing.assert_close(ours, theirs, **tolerance)


# The definitions, by hand.


def test_softmax_weights_by_hand():
    theta, phi = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, math.log(3.0)]]])
    expected = torch.tensor([[[1 / 4, 3 / 4], [1 / 2, 1 / 2]]])  # exp(0) : exp(log 3), then equal
    torch.testing.assert_close(pairwise.softmax_weights(theta, phi, None, 1.0), expected)
    expected[0, 0] = torch.tensor([1 / 10, 9 / 10])  # 1 : 3 squared
    torch.testing.assert_close(pairwise.softmax_weights(theta, phi, None, 2.0), expected)


def test_dot_product_weights_by_hand():
    theta, phi = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 1.0, 5.0], [-1.0, 1.0, 5.0]]])
    expected = torch.tensor([[[1 / 3, 1.0, 5.0]]])  # (3 - 2) / 3, (1 + 2) / 3, (5 + 10) / 3
    torch.testing.assert_close(pairwise.dot_product_weights(theta, phi, None), expected)
    mask = torch.tensor([[True, True, False]])
    expected = torch.tensor([[[1 / 2, 3 / 2, 0.0]]])  # the same sums over two keys
    torch.testing.assert_close(pairwise.dot_product_weights(theta, phi, mask), expected)


def test_concatenation_weights_by_hand():
    a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 2.0, -1.0]])
    expected = torch.tensor([[[1.5 / 3, 1.0, 0.0], [0.0, 0.0, 0.0]]])  # 3 / 3; 1 - 1 and 2 - 2: 0
    torch.testing.assert_close(pairwise.concatenation_weights(a, b, None), expected)
    mask = torch.tensor([[True, False, True]])
    expected = torch.tensor([[[1.5 / 2, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(pairwise.concatenation_weights(a, b, mask), expected)


# The fast implementations.


@exactly_repeated
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(0, 3),
    width=st.integers(1, 5),
    values=st.integers(1, 5),
    queries=st.integers(0, 40),
    keys=st.integers(0, 40),
    mask_rows=st.sampled_from((None, 0, 1, 3)),
    small=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fast_is_dense(kind, batch, width, values, queries, keys, mask_rows, small, seed):
    inputs = make(kind, batch, width, values, queries, keys, seed=seed)
    mask = None if mask_rows is None else make_mask(batch, keys, seed, mask_rows)
    with mock.patch.object(tiled_softmax, "TILE", 7 if small else tiled_softmax.TILE):
        with mock.patch.object(hinge_sums, "BLOCK", 90 if small else hinge_sums.BLOCK):
            assert_same(kind, inputs, mask)


@exactly_repeated
@given(
    width=st.integers(1, 5),
    values=st.integers(1, 5),
    queries=st.integers(1, 30),
    keys=st.integers(1, 30),
    mask_rows=st.sampled_from((None, 0, 1)),
    seed=st.integers(0, 99),
)
def test_fused_attention_is_dense(width, values, queries, keys, mask_rows, seed):
    inputs = make("softmax", 2, width, values, queries, keys, seed=seed)
    mask = None if mask_rows is None else make_mask(2, keys, seed, mask_rows)

    def fused(kind, theta, phi, g, mask):
        return pairwise._fused_attention(theta, phi, g, mask, SCALE)

    assert_same("softmax", inputs, mask, fused)


@exactly_repeated
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    highest=st.integers(0, 4),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_concatenation_with_ties(queries, keys, highest, masked, seed):
    """Whole numbers: sums are often exactly 0, where the gradient of ReLU is 0."""
    rng = torch.Generator().manual_seed(seed)
    sizes = ((2, queries), (2, keys), (2, 2, keys))
    inputs = [torch.randint(-highest, highest + 1, s, generator=rng).double() for s in sizes]
    mask = make_mask(2, keys, seed) if masked else None
    assert_same("concatenation", [x.requires_grad_() for x in inputs], mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, masked):
    inputs = make(kind, queries=6, keys=9, values=2)
    mask = make_mask(2, 9, empty_rows=1) if masked else None
    with mock.patch.object(tiled_softmax, "TILE", 4):
        torch.autograd.gradcheck(lambda *x: fast(kind, *x, mask), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_without_keys_the_result_is_zero(kind):
    inputs, mask = make(kind), make_mask(2, 17, empty_rows=2)
    for result in value_and_gradients(lambda *x: fast(kind, *x, mask), inputs):
        assert not result.any()


@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_as_if_keys_were_absent(kind):
    theta, phi, g = make(kind, batch=1)
    mask = make_mask(1, 17)
    kept = fast(kind, theta, phi[..., mask[0]], g[..., mask[0]])
    torch.testing.assert_close(fast(kind, theta, phi, g, mask), kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [fast, dense])
def test_order_of_positions(form, kind):
    """Queries in another order give results in that order; the order of keys does not matter."""
    theta, phi, g = make(kind)
    y = form(kind, theta, phi, g)
    turned = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form(kind, theta[..., turned], phi, g), y[..., turned])
    turned = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(form(kind, theta, phi[..., turned], g[..., turned]), y)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    inputs = [x.detach().mT.contiguous().mT.requires_grad_() for x in make(kind)]
    inputs[2] = inputs[2].detach()[:, :1].expand(2, 4, 17).requires_grad_()
    assert_same(kind, inputs, make_mask(2, 17))
    total = fast(kind, *inputs).sum()  # its gradient is a single number, expanded
    expected = torch.autograd.grad(dense(kind, *inputs).sum(), inputs)
    for ours, theirs in zip(torch.autograd.grad(total, inputs), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_repetition_gives_the_same_bits(kind):
    inputs = make(kind, width=16, values=8, queries=1500, keys=1300, dtype=torch.float32)
    mask = make_mask(2, 1300)
    first, second = (value_and_gradients(lambda *x: fast(kind, *x, mask), inputs) for _ in "12")
    for one, other in zip(first, second):
        assert torch.equal(one, other)


# Precision.


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("queries, keys", [(8, MANY), (MANY, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_does_not_grow_with_positions(kind, queries, keys, equal):
    """Every sum over positions is made in blocks of at most 1024, and so are the gradients.

    Equal numbers are the worst case: added one by one, all roundings may go in one direction.
    """
    inputs = [x.detach().abs() for x in make(kind, 1, 4, 4, queries, keys, dtype=torch.float32)]
    if equal:
        inputs = [torch.full_like(x, size) for x, size in zip(inputs, (0.1, 0.7, 1.1))]
    inputs = [x.requires_grad_() for x in inputs]
    toward = torch.full((1, 4, queries), 0.3)
    y = fast(kind, *inputs)
    found = [y.detach(), *torch.autograd.grad(y, inputs, toward)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = dense(kind, *exact)
    expected = [y.detach(), *torch.autograd.grad(y, exact, toward.double())]
    roundings = 4 + 4 + blocked(MANY, 1024)
    for ours, truth, size in zip(found, expected, sizes(kind, exact, toward.double())):
        assert_near(ours, truth, roundings=roundings / 2, size=size)  # only ours is rounded


def test_rounding_of_far_away_numbers():
    """Keys and queries around 1000 whose sums are near 0: the sorted sums must not cancel."""
    a, b, g = make("concatenation", 1, 1, 4, 3000, 2000, dtype=torch.float32)
    inputs = [(a + 1000).detach().requires_grad_(), (b - 1000).detach().requires_grad_(), g]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = value_and_gradients(lambda *x: dense("concatenation", *x), exact)
    found = value_and_gradients(lambda *x: fast("concatenation", *x), inputs)
    for ours, truth in zip(found, reference):
        assert (ours - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compared", [1e3, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_a_thousand_stay_finite(kind, compared, dtype, autocast):
    """Values and gradients of 1000; what is compared too, or so small that all weights count."""
    for queries, keys, values in ((5, 6, 64), (40, 1100, 64), (1100, 40, 16)):
        inputs = make(kind, 2, 64, values, queries, keys, dtype=torch.float32)
        sizes = (compared, compared, 1e3)
        inputs = [(size * x).clamp(-1e3, 1e3) for size, x in zip(sizes, inputs)]
        inputs = [x.to(dtype).detach().requires_grad_() for x in inputs]
        for mask in (None, make_mask(2, keys, empty_rows=1)):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                y = fast(kind, *inputs, mask)
                shares = weights(kind, *inputs[:2], mask)
                with torch.no_grad():
                    unlearned = fast(kind, *inputs, mask)
            gradients = torch.autograd.grad(y, inputs, torch.full_like(y, 1e3))
            assert y.dtype == unlearned.dtype == dtype
            for result in (y, unlearned, shares, *gradients):
                assert result.isfinite().all()


@pytest.mark.parametrize("dtype, error", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_exact_as_its_dtype(kind, dtype, error):
    inputs = [x.detach().to(dtype).requires_grad_() for x in make(kind, 2, 8, 4, 90, 70)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = value_and_gradients(lambda *x: dense(kind, *x), exact)
    for ours, truth in zip(value_and_gradients(lambda *x: fast(kind, *x), inputs), reference):
        assert ours.dtype == dtype
        assert (ours - truth).abs().max() <= error * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_inside(kind):
    for queries, keys in ((3, 4), (90, 70)):
        inputs = make(kind, 2, 8, 8, queries, keys, dtype=torch.float32)
        expected = fast(kind, *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(kind, *inputs), expected)
            with torch.no_grad():
                torch.testing.assert_close(fast(kind, *inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_are_never_denormal(dtype):
    smallest = math.sqrt(torch.finfo(dtype).tiny)
    x = torch.linspace(4 * math.log(smallest), 0.0, 10001, dtype=dtype)
    found = tiled_softmax._exp_(x.clone())
    assert ((found == 0) | (found > 0.99 * smallest)).all()
    torch.testing.assert_close(found, x.exp(), rtol=1e-6, atol=1.01 * smallest)


# Memory.

PEAK = """
import sys, torch
from nonlocal_det.layers import pairwise
torch.set_num_threads(1)
n = 8400
def peak(): return next(int(s.split()[1]) for s in open("/proc/self/status") if "VmHWM" in s) / 1024
def call(n, width, values, masked, learns):
    mask = torch.rand(1, n) < 0.9 if masked else None
    sizes = ((1, width, n),) * 2 + ((1, n),) * 2
    theta, phi, a, b = (torch.randn(s, requires_grad=learns) for s in sizes)
    g = torch.randn(1, values, n, requires_grad=learns)
    for y in (pairwise.softmax_attention(theta, phi, g, mask, 0.5),
              pairwise._fused_attention(theta, phi, g, mask, 0.5),
              pairwise.dot_product_attention(theta, phi, g, mask),
              pairwise.concatenation_attention(a, b, g, mask)):
        if learns: y.sum().backward()
for case in ((8, 8, False, False), (8, 4, False, False), (8, 8, True, False), (8, 4, True, True)):
    call(40, *case)
    before = peak()
    call(n, *case)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_weights_are_never_stored():
    """At 8,400 positions they are 269 MiB, and a tile 4."""
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK], check=True, capture_output=True, text=True
    ).stdout
    peaks = [float(line) for line in output.split()]
    assert len(peaks) == 4
    assert max(peaks) < 60


# Transformations: recorded at one size, run at another.


class Attention(torch.nn.Module):
    """One of the functions as a module."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, theta, phi, g, mask=None):
        return fast(self.kind, theta, phi, g, mask)


def recorded_and_other(kind, masked, width=6, values=6):
    """Inputs to record with, and inputs of other sizes."""
    recorded = make(kind, 2, width, values, 21, 33, torch.float32)
    other = make(kind, 3, width, values, 50, 18, torch.float32)
    if masked:
        recorded.append(make_mask(2, 33))
        other.append(make_mask(3, 18, empty_rows=1))
    return [tuple(x.detach() for x in inputs) for inputs in (recorded, other)]


def dynamic_sizes(kind, masked):
    batch, queries, keys = (torch.export.Dim(name, min=2) for name in ("b", "n", "m"))
    last = 1 if kind == "concatenation" else 2
    sizes = ({0: batch, last: queries}, {0: batch, last: keys}, {0: batch, 2: keys})
    return (*sizes, {0: batch, 1: keys}) if masked else sizes


transformed = pytest.mark.parametrize("masked", [False, True])
each_kind = pytest.mark.parametrize("kind", KINDS)


@transformed
@each_kind
def test_scripted(kind, masked):
    extra = (SCALE,) if kind == "softmax" else ()
    attention = torch.jit.script(getattr(pairwise, f"{kind}_attention"))
    shares = torch.jit.script(getattr(pairwise, f"{kind}_weights"))
    for theta, phi, g, *mask in recorded_and_other(kind, masked):
        mask = mask[0] if masked else None
        torch.testing.assert_close(
            attention(theta, phi, g, mask, *extra), fast(kind, theta, phi, g, mask)
        )
        torch.testing.assert_close(
            shares(theta, phi, mask, *extra), weights(kind, theta, phi, mask)
        )


@each_kind
def test_scripted_gradients(kind):
    scripted = torch.jit.script(getattr(pairwise, f"{kind}_attention"))
    extra = (SCALE,) if kind == "softmax" else ()
    mask = make_mask(2, 33, empty_rows=1)
    inputs = make(kind, 2, 6, 4, 21, 33)
    expected = value_and_gradients(lambda *x: dense(kind, *x, mask), inputs)
    for ours, theirs in zip(
        value_and_gradients(lambda *x: scripted(*x, mask, *extra), inputs), expected
    ):
        torch.testing.assert_close(ours, theirs)


@transformed
@each_kind
def test_traced(kind, masked):
    recorded, other = recorded_and_other(kind, masked, values=4)
    traced = torch.jit.trace(Attention(kind), recorded)
    torch.testing.assert_close(traced(*other), fast(kind, *other))


@transformed
@each_kind
def test_exported(kind, masked):
    recorded, other = recorded_and_other(kind, masked)
    sizes = dynamic_sizes(kind, masked)
    program = torch.export.export(Attention(kind), recorded, dynamic_shapes=sizes)
    torch.testing.assert_close(program.module()(*other), fast(kind, *other))


@transformed
@each_kind
def test_compiled(kind, masked):
    torch.compiler.reset()
    compiled = torch.compile(Attention(kind), backend="aot_eager", fullgraph=True, dynamic=True)
    for inputs in recorded_and_other(kind, masked):
        learning = [x.clone().requires_grad_() for x in inputs[:3]]
        expected = value_and_gradients(lambda *x, i=inputs: fast(kind, *x, *i[3:]), learning)
        found = value_and_gradients(lambda *x, i=inputs: compiled(*x, *i[3:]), learning)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@transformed
@each_kind
def test_onnx(kind, masked, exporter, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    recorded, other = recorded_and_other(kind, masked)
    sizes = dynamic_sizes(kind, masked)
    options = {"dynamic_shapes": sizes, "verbose": False}
    if exporter == "torchscript":
        names = ["theta", "phi", "g", "mask"][: len(recorded)]
        axes = {name: list(axis) for name, axis in zip(names, sizes)}
        options = {"input_names": names, "dynamic_axes": axes, "opset_version": 17}
    else:
        pytest.importorskip("onnxscript")
    path = str(tmp_path / "sums.onnx")
    torch.onnx.export(Attention(kind), recorded, path, dynamo=exporter == "dynamo", **options)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), other)}
    found = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(found, fast(kind, *other), rtol=1e-4, atol=1e-5)
