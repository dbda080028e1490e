"""Blocks leave Python as they are: scripted, traced, compiled, exported, in onnxruntime.

Variants travel together, in one module that returns each one's output, so that each route is paid
for once. They are active (random output convolution and norm) and compared at sizes other than the
one they were exported with.
"""

from __future__ import annotations

import io
import shutil

import pytest
import torch
import torch.nn as nn
from tolerances import assert_near, sensitivity, steps_of_block

from nonlocal_det.layers import MECHANISMS, PAIRWISE

pytestmark = pytest.mark.numeric

CHANNELS, INNER = 8, 4

# name: (mechanism, options)
VARIANTS = {
    **{pairwise: ("non_local", {"pairwise": pairwise}) for pairwise in PAIRWISE},
    **{f"{p}-pooled": ("non_local", {"pairwise": p, "subsample": True}) for p in PAIRWISE},
    "pool-first": ("non_local", {"subsample": True, "pool_first": True, "scale": True}),
    "no-norm": ("non_local", {"norm": ""}),
    "group-norm": ("non_local", {"norm": "GN"}),
    "global-context": ("global_context", {}),
    "disentangled": ("disentangled", {}),
    "disentangled-pooled": ("disentangled", {"subsample": True}),
    "compact": ("compact_generalized", {"groups": 2, "scale": True}),
    "compact-taylor": ("compact_generalized", {"kernel": "gaussian", "gamma": 0.1}),
    "heads": ("windowed", {"num_heads": 2}),
    "windows": ("windowed", {"window_size": 3, "num_heads": 2}),
    "windows-dot": ("windowed", {"window_size": 2, "pairwise": "dot_product"}),
    "windows-concatenation": ("windowed", {"window_size": 2, "pairwise": "concatenation"}),
}
# One of each kind of operation that test_pairwise leaves out, where a route is slow.
FRAMES = ("pool-first", "global-context", "disentangled-pooled", "compact", "windows")
TRACED_AT, RUN_AT = (
    (2, CHANNELS, 6, 8),
    ((2, CHANNELS, 6, 8), (2, CHANNELS, 7, 5), (3, CHANNELS, 9, 12)),
)


class Side(nn.Module):
    """Variants side by side on the same input."""

    def __init__(self, names=tuple(VARIANTS)):
        super().__init__()
        torch.manual_seed(0)
        self.names = names
        self.blocks = nn.ModuleList()
        for name in names:
            mechanism, options = VARIANTS[name]
            self.blocks.append(MECHANISMS[mechanism](CHANNELS, inner_channels=INNER, **options))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.eval()

    def forward(self, x, mask=None):
        return [block(x, mask) for block in self.blocks]


def example(shape, seed=0):
    """x and a mask; of three images, the last has no position that takes part."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape[0], *shape[2:], generator=generator) < 0.7
    mask[2:] = False
    return torch.randn(shape, generator=generator), mask


def assert_near_block(found, expected, block, x, mask=None, name=""):
    """Two results of a block are equal up to rounding."""
    size = sensitivity(lambda block, x: [block(x, mask)], block, x)
    roundings = steps_of_block(x, block.inner_channels)
    assert_near(found, expected, roundings=roundings, size=size, name=name)


def assert_same_elsewhere(function, side: Side, masked: bool):
    """``function`` of a list of inputs gives what the blocks give, at every size."""
    for shape in RUN_AT:
        inputs = example(shape, seed=1)[: 1 + masked]
        results, expected = function(inputs), side(*inputs)
        assert len(results) == len(side.names)
        for name, block, got, wanted in zip(side.names, side.blocks, results, expected):
            assert_near_block(got, wanted, block, *inputs, name=name)


def in_onnxruntime(model: bytes):
    """A function of a list of inputs that runs the model."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs):
        feed = {name: value.numpy() for name, value in zip(names, inputs)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


@pytest.fixture(scope="module")
def side() -> Side:
    return Side()


each_masking = pytest.mark.parametrize("masked", (False, True))
slow = pytest.mark.slow
quietly = pytest.mark.filterwarnings("ignore")  # of torch, on what it would rather see used


@quietly
@each_masking
@torch.no_grad()
def test_trace(side, masked):
    traced = torch.jit.trace(side, example(TRACED_AT)[: 1 + masked], check_trace=False)
    assert_same_elsewhere(lambda inputs: traced(*inputs), side, masked)


@quietly
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_script(name):
    side = Side((name,))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(side.blocks[0]), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    for masked in (False, True):
        assert_same_elsewhere(lambda inputs: [scripted(*inputs)], side, masked)


@pytest.mark.parametrize("dims", (1, 3))
@quietly
def test_script_of_other_dimensions(dims):
    for mechanism in MECHANISMS.values():
        block = mechanism(CHANNELS, dims=dims, norm="")
        nn.init.normal_(block.out.weight)
        x, mask = example((2, CHANNELS, 3, 4, 5)[: dims + 2])
        assert_near_block(torch.jit.script(block)(x, mask), block(x, mask), block, x, mask)


@slow
@quietly
@each_masking
@torch.no_grad()
def test_export(masked):
    side, free = Side(FRAMES), torch.export.Dim.AUTO
    shapes = ({0: free, 2: free, 3: free}, {0: free, 1: free, 2: free})[: 1 + masked]
    program = torch.export.export(side, example(TRACED_AT)[: 1 + masked], dynamic_shapes=shapes)
    module = program.module()
    assert_same_elsewhere(lambda inputs: module(*inputs), side, masked)


@slow
@quietly
@pytest.mark.parametrize(
    ("names", "masked"), ((PAIRWISE, False), ((*FRAMES, "dot_product", "concatenation"), True))
)
@torch.no_grad()
def test_onnx(names, masked):
    pytest.importorskip("onnxscript")
    side, free = Side(names), torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free}, {0: free, 1: free, 2: free})[: 1 + masked]
    inputs, buffer = example(TRACED_AT)[: 1 + masked], io.BytesIO()
    torch.onnx.export(side, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False).save(buffer)
    assert_same_elsewhere(in_onnxruntime(buffer.getvalue()), side, masked)


@pytest.mark.slow
@quietly
@pytest.mark.parametrize(("opset", "masked"), ((11, False), (11, True), (17, True)))
@torch.no_grad()
def test_legacy_onnx(side, opset, masked):
    """In detectron2's opset, and in ours."""
    pytest.importorskip("onnx")
    inputs, buffer = example(TRACED_AT)[: 1 + masked], io.BytesIO()
    torch.onnx.export(
        side,
        inputs,
        buffer,
        dynamo=False,
        opset_version=opset,
        input_names=["x", "mask"][: 1 + masked],
        dynamic_axes={"x": {0: "b", 2: "h", 3: "w"}, "mask": {0: "b", 1: "h", 2: "w"}},
    )
    assert_same_elsewhere(in_onnxruntime(buffer.getvalue()), side, masked)


@slow
@quietly
@torch.no_grad()
def test_compile(tmp_path, monkeypatch):
    """Captured whole and for any size, and built by the default compiler."""
    # Code that another run built for other instructions of the CPU does not compile with this one.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile builds with a C++ compiler, and none was found")
    torch._dynamo.reset()
    side = Side(("embedded_gaussian",))  # the rest: see below
    options = {"compile_threads": 1}  # no pool of processes for one small graph
    compiled = torch.compile(side, dynamic=True, fullgraph=True, options=options)
    assert_same_elsewhere(lambda inputs: compiled(*inputs), side, masked=True)


@slow
@quietly
def test_compiled_gradients():
    """Captured whole with its backward, without the compiler."""
    torch._dynamo.reset()
    side = Side(FRAMES)
    compiled = torch.compile(side, backend="aot_eager", fullgraph=True)
    x, mask = example(TRACED_AT)

    def gradient(function, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(sum(y.square().mean() for y in function(x, mask)), x)

    size, roundings = sensitivity(gradient, side, x), len(FRAMES) * steps_of_block(x, INNER)
    assert_near(*gradient(compiled, x), *gradient(side, x), roundings=roundings, size=size)
