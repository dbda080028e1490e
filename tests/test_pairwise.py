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
- softmax: rows without a finite logit taken for rows without keys; concatenation: no look at keys,
  or at values, that are not finite
- all: the first gradient's kernels used for the second; the mapped dimension of vmap taken for the
  batch; the eager implementation taken while being traced or exported; float16 results, or
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

import nonlocal_det
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


def direction(inputs):
    """A fixed random gradient of y, in its dtype."""
    (batch, values, _), queries, dtype = inputs[2].shape, inputs[0].shape[-1], inputs[2].dtype
    rng = torch.Generator().manual_seed(0)
    return torch.randn(batch, values, queries, generator=rng, dtype=torch.float64).to(dtype)


def value_and_gradients(function, inputs, toward=None):
    y = function(*inputs)
    toward = direction(inputs) if toward is None else toward
    return [y.detach(), *torch.autograd.grad(y, inputs, toward)]


def sizes_of_weights(kind, theta, phi, mask=None):
    """What the sizes of the terms of each weight add up to."""
    a, b = theta.double().abs(), phi.double().abs()
    if kind == "softmax":
        # What a logit is off by, its exponential is off by in proportion.
        logits = SCALE * a.mT @ b
        steep = 1 + logits.amax(dim=(1, 2), keepdim=True) if logits.numel() else 1
        return weights(kind, theta.double(), phi.double(), mask) * steep
    products = a.mT @ b if kind == "dot_product" else a.unsqueeze(2) + b.unsqueeze(1)
    return products * share_of_keys(products[:, :1], mask)


def share_of_keys(like, mask):
    """(B, 1, M): 1 / (number of keys) where a key takes part, 0 elsewhere."""
    part = torch.ones_like(like) if mask is None else mask.unsqueeze(1).to(like)
    return part / part.sum(dim=2, keepdim=True).clamp(min=1)


@torch.no_grad()
def sizes(kind, inputs, toward, mask=None):
    """What the sizes of the terms add up to in y and in the gradients of theta, phi and g."""
    theta, phi, g, toward = (x.double().abs() for x in (*inputs, toward))
    shares = sizes_of_weights(kind, *inputs[:2], mask)
    y, d_g, pull = g @ shares.mT, toward @ shares, toward.mT @ g
    if kind == "softmax":
        pull = SCALE * shares * (pull + (toward * y).sum(dim=1).unsqueeze(2))
    else:
        pull = pull * share_of_keys(g[:, :1], mask)
    if kind == "concatenation":
        return y, pull.sum(dim=2), pull.sum(dim=1), d_g
    return y, phi @ pull.mT, theta @ pull, d_g


def steps(*inputs):
    """Roundings on the way through sums over channels and positions; 20 for all that is no sum."""
    return 20 + sum(sum(x.shape[1:]) for x in inputs)


def assert_same_sums(kind, inputs, found, expected, mask=None):
    """y, and as many gradients as there are, are equal up to rounding.

    A weight below the smallest that is kept may be left out: sizes are those of the largest.
    """
    for ours, theirs, size in zip(found, expected, sizes(kind, inputs, direction(inputs), mask)):
        size = size.amax() if size.numel() else 0
        assert_near(ours, theirs, roundings=steps(inputs[0], inputs[2]), size=size)


def assert_same(kind, inputs, mask=None, function=None):
    """Values with and without gradients, and the gradients, are those of the dense form."""
    function = function or fast
    expected = value_and_gradients(lambda *x: dense(kind, *x, mask), inputs)
    found = value_and_gradients(lambda *x: function(kind, *x, mask), inputs)
    assert_same_sums(kind, inputs, found, expected, mask)
    with torch.inference_mode():
        assert_same_sums(kind, inputs, [function(kind, *inputs, mask)], expected, mask)


# The definitions, by hand.


def test_softmax_weights_by_hand():
    theta, phi = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, math.log(3.0)]]])
    expected = torch.tensor([[[1 / 4, 3 / 4], [1 / 2, 1 / 2]]])  # exp(0) : exp(log 3), then equal
    assert_near(pairwise.softmax_weights(theta, phi, None, 1.0), expected, roundings=8)
    expected[0, 0] = torch.tensor([1 / 10, 9 / 10])  # 1 : 3 squared
    assert_near(pairwise.softmax_weights(theta, phi, None, 2.0), expected, roundings=8)


def test_dot_product_weights_by_hand():
    theta, phi = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 1.0, 5.0], [-1.0, 1.0, 5.0]]])
    expected = torch.tensor([[[1 / 3, 1.0, 5.0]]])  # (3 - 2) / 3, (1 + 2) / 3, (5 + 10) / 3
    assert_near(pairwise.dot_product_weights(theta, phi, None), expected, roundings=8)
    mask = torch.tensor([[True, True, False]])
    expected = torch.tensor([[[1 / 2, 3 / 2, 0.0]]])  # the same sums over two keys
    assert_near(pairwise.dot_product_weights(theta, phi, mask), expected, roundings=8)


def test_concatenation_weights_by_hand():
    a, b = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 2.0, -1.0]])
    expected = torch.tensor([[[1.5 / 3, 1.0, 0.0], [0.0, 0.0, 0.0]]])  # 3 / 3; 1 - 1 and 2 - 2: 0
    assert_near(pairwise.concatenation_weights(a, b, None), expected, roundings=8)
    mask = torch.tensor([[True, False, True]])
    expected = torch.tensor([[[1.5 / 2, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert_near(pairwise.concatenation_weights(a, b, mask), expected, roundings=8)


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


@given(st.integers(1, 300), st.integers(1, 300))
def test_fused_widths(width, value_width):
    """As PyTorch's kernels want them: equal on a CPU, elsewhere multiples of 8; never narrower."""
    assert set(pairwise._fused_widths("cpu", width, value_width)) == {max(width, value_width)}
    for given_width, padded in zip(
        (width, value_width), pairwise._fused_widths("cuda", width, value_width)
    ):
        assert padded % 8 == 0 and 0 <= padded - given_width < 8


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
    assert_same_sums(kind, (theta, phi, g), [fast(kind, theta, phi, g, mask)], [kept], mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [fast, dense])
def test_order_of_positions(form, kind):
    """Queries in another order give results in that order; the order of keys does not matter."""
    inputs = theta, phi, g = make(kind)
    y = form(kind, theta, phi, g)
    turned = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    moved = form(kind, theta[..., turned], phi, g)
    assert_same_sums(kind, inputs, [moved], [y[..., turned]])
    turned = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    moved = form(kind, theta, phi[..., turned], g[..., turned])
    assert_same_sums(kind, inputs, [moved], [y])


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    inputs = [x.detach().mT.contiguous().mT.requires_grad_() for x in make(kind)]
    inputs[2] = inputs[2].detach()[:, :1].expand(2, 4, 17).requires_grad_()
    assert_same(kind, inputs, make_mask(2, 17))
    ones = torch.ones(1, 1, 1, dtype=torch.float64).expand(2, 4, 20)  # the gradient of a sum
    expected = value_and_gradients(lambda *x: dense(kind, *x), inputs, ones)
    found = value_and_gradients(lambda *x: fast(kind, *x), inputs, ones)
    for ours, theirs, size in zip(found, expected, sizes(kind, inputs, ones)):
        assert_near(ours, theirs, roundings=steps(inputs[0], inputs[2]), size=size)


@pytest.mark.parametrize("kind", KINDS)
def test_repetition_gives_the_same_bits(kind):
    inputs = make(kind, width=16, values=8, queries=1500, keys=1300, dtype=torch.float32)
    mask = make_mask(2, 1300)
    first, second = (value_and_gradients(lambda *x: fast(kind, *x, mask), inputs) for _ in "12")
    for one, other in zip(first, second):
        assert torch.equal(one, other)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries, keys", [(1100, 1300), (40, 30)])
@pytest.mark.parametrize("kind", KINDS)
def test_function_transforms(kind, queries, keys, masked):
    """torch.func's gradients, and per-sample ones by vmap, are autograd's."""
    inputs = [x.detach() for x in make(kind, 3, 4, 5, queries, keys)]
    mask = make_mask(3, keys, empty_rows=1) if masked else torch.ones(3, keys, dtype=torch.bool)
    toward = direction(inputs)

    def loss(theta, phi, g, mask, toward):
        return (fast(kind, theta, phi, g, mask if masked else None) * toward).sum()

    def loss_of_one(*sample):
        return loss(*(x[None] for x in sample))

    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss(*leaves, mask, toward), leaves)
    whole = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs, mask, toward)
    of_one = torch.func.grad(loss_of_one, argnums=(0, 1, 2))
    each = torch.func.vmap(of_one)(*inputs, mask, toward)
    for found in (whole, each):
        for ours, truth in zip(found, expected):
            assert_near(ours, truth, roundings=2 * (queries + keys))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, masked):
    """Checked by differences, where the gradient of y needs none (a sum) and where it does."""
    inputs = make(kind, 2, 2, 2, 4, 3)
    mask = make_mask(2, 3, empty_rows=1) if masked else None
    assert torch.autograd.gradgradcheck(lambda *x: fast(kind, *x, mask), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: fast(kind, *x, mask).sum(), inputs)


# Numbers that are not finite are never hidden.

NOT_FINITE = [
    (which, value)
    for which in ("query", "key", "value")
    for value in (math.nan, math.inf, -math.inf)
]


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("which, value", NOT_FINITE)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_shows(kind, which, value, everywhere, learns):
    """Wherever the dense form has no finite result, and in no other sample."""
    inputs = [x.detach() for x in make(kind, 2, 3, 4, 30, 25)]
    place = ("query", "key", "value").index(which)
    inputs[place][0, ..., slice(None) if everywhere else 7] = value
    truth = dense(kind, *inputs)
    inputs = [x.requires_grad_(learns) for x in inputs]
    found = fast(kind, *inputs).detach()
    assert not truth.isfinite().all() or (kind, value) == ("concatenation", -math.inf)
    assert not (found.isfinite() & ~truth.isfinite()).any()
    assert_near(found[1], truth[1], roundings=100)


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
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = value_and_gradients(lambda *x: dense(kind, *x), exact, toward.double())
    found = value_and_gradients(lambda *x: fast(kind, *x), inputs, toward)
    roundings = 20 + 4 + 4 + 8 + blocked(MANY, 1024)
    for ours, truth, size in zip(found, expected, sizes(kind, exact, toward)):
        assert_near(ours, truth, roundings=roundings / 2, size=size)  # only ours is rounded


def test_rounding_of_far_away_numbers():
    """Keys and queries around 1e5 whose sums are near 0: the sorted form must not cancel.

    The sums themselves are exact, so the sizes are those of the weights.
    """
    a, b, g = make("concatenation", 1, 1, 4, 300, 200, dtype=torch.float32)
    inputs = [(a + 1e5).detach().requires_grad_(), (b - 1e5).detach().requires_grad_(), g]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = value_and_gradients(lambda *x: dense("concatenation", *x), exact)
    found = value_and_gradients(lambda *x: fast("concatenation", *x), inputs)
    shares = weights("concatenation", *exact[:2])
    _, d_a, d_b, _ = sizes("concatenation", exact, direction(inputs))
    bounds = g.abs().double() @ shares.mT, d_a, d_b, direction(inputs).abs().double() @ shares
    for ours, truth, size in zip(found, expected, bounds):
        assert_near(ours, truth, roundings=steps(a, b, g), size=size.amax())


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_exact_as_its_dtype(kind, dtype):
    """Rounded to it are a weight, its gradient, and the result; all else is rounded to float32."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in make(kind, 2, 8, 4, 90, 70)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = value_and_gradients(lambda *x: dense(kind, *x), exact)
    found = value_and_gradients(lambda *x: fast(kind, *x), inputs)
    half, full = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    roundings = 3 + steps(inputs[0], inputs[2]) * full / half
    for ours, truth, size in zip(found, expected, sizes(kind, exact, direction(inputs))):
        assert ours.dtype == dtype
        assert_near(ours, truth, roundings=roundings / 2, size=size)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_inside(kind):
    for queries, keys in ((3, 4), (90, 70)):
        inputs = make(kind, 2, 8, 8, queries, keys, dtype=torch.float32)
        expected = fast(kind, *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(kind, *inputs), expected)
            with torch.no_grad():
                assert_same_sums(kind, inputs, [fast(kind, *inputs)], [expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_are_never_denormal(dtype):
    smallest = math.sqrt(torch.finfo(dtype).tiny)
    x = torch.linspace(4 * math.log(smallest), 0.0, 10001, dtype=dtype)
    found = tiled_softmax._exp_(x.clone())
    assert ((found == 0) | (found > 0.99 * smallest)).all()
    kept = found > 0
    assert_near(found[kept], x.exp()[kept], roundings=4, size=x.exp()[kept])
    assert (x.exp()[~kept] < 1.01 * smallest).all()


# Memory.

PEAK = """
import sys, types, torch
package = sys.modules["nonlocal_det"] = types.ModuleType("nonlocal_det")
package.__path__ = [sys.argv[1]]  # without detectron2, which takes long to load
from nonlocal_det.layers import pairwise
torch.set_num_threads(1)
n = 4200
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_weights_are_never_stored():
    """At 4,200 positions they are 67 MiB, and a tile 4."""
    command = [sys.executable, "-W", "ignore", "-c", PEAK, nonlocal_det.__path__[0]]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peaks = [float(line) for line in output.split()]
    assert len(peaks) == 4
    assert max(peaks) < 30


# Transformations: recorded at one size, run at another. ONNX: see test_layers_export.


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
        y = attention(theta, phi, g, mask, *extra)
        assert_same_sums(kind, (theta, phi, g), [y], [fast(kind, theta, phi, g, mask)], mask)
        expected, size = (f(kind, theta, phi, mask) for f in (weights, sizes_of_weights))
        found = shares(theta, phi, mask, *extra)
        assert_near(found, expected, roundings=steps(theta, phi), size=size)


@each_kind
def test_scripted_gradients(kind):
    scripted = torch.jit.script(getattr(pairwise, f"{kind}_attention"))
    extra = (SCALE,) if kind == "softmax" else ()
    mask = make_mask(2, 33, empty_rows=1)
    inputs = make(kind, 2, 6, 4, 21, 33)
    assert_same(kind, inputs, mask, lambda _, *x: scripted(*x, *extra))


@transformed
@each_kind
def test_traced(kind, masked):
    recorded, other = recorded_and_other(kind, masked, values=4)
    traced = torch.jit.trace(Attention(kind), recorded)
    assert_same_sums(kind, other[:3], [traced(*other)], [fast(kind, *other)], *other[3:])


@transformed
@each_kind
def test_exported(kind, masked):
    recorded, other = recorded_and_other(kind, masked)
    sizes = dynamic_sizes(kind, masked)
    program = torch.export.export(Attention(kind), recorded, dynamic_shapes=sizes)
    found = program.module()(*other)
    assert_same_sums(kind, other[:3], [found], [fast(kind, *other)], *other[3:])


@transformed
@each_kind
def test_compiled(kind, masked):
    torch.compiler.reset()
    compiled = torch.compile(Attention(kind), backend="aot_eager", fullgraph=True, dynamic=True)
    for inputs in recorded_and_other(kind, masked):
        learning = [x.clone().requires_grad_() for x in inputs[:3]]
        expected = value_and_gradients(lambda *x, i=inputs: fast(kind, *x, *i[3:]), learning)
        found = value_and_gradients(lambda *x, i=inputs: compiled(*x, *i[3:]), learning)
        assert_same_sums(kind, learning, found, expected, *inputs[3:])
