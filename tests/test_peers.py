"""``nonlocal-det benchmark --peers``: same function, same weights, and what differs is not timed.

The packages themselves are tested where they are installed. Stand-ins take their place elsewhere:
`NonLocalAttn` computes what timm's does, `GlobalContext` something else.

Mutations tried by hand; each makes at least one test here fail: weights that are not carried over;
timm's scale kept in both blocks, its eps of the layer norm kept; a tolerance of 1; ratios of peer
over ours, or of medians; a case of a setting that a peer lacks; keys that are not subsampled in the
estimate of memory.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from dataclasses import asdict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_near, sensitivity, steps_of_block
from tool_process import run_tool
from torch import nn

from nonlocal_det.benchmark import cases, peer_comparison
from nonlocal_det.benchmark.cases import Case, fits_in_memory
from nonlocal_det.benchmark.peer_comparison import compare_outputs, measure_peer
from nonlocal_det.benchmark.peer_report import peer_plot, peer_table
from nonlocal_det.benchmark.peers import GLOBAL_CONTEXT, PEERS, Setting
from nonlocal_det.cli.benchmark import main, make_peer_cases, parse_args
from nonlocal_det.layers import PAIRWISE

MODULES = sorted({peer.module for peer in PEERS.values()})


class NonLocalAttn(nn.Module):
    def __init__(self, in_channels, rd_channels):
        super().__init__()
        self.t, self.p, self.g = (nn.Conv2d(in_channels, rd_channels, 1) for _ in range(3))
        self.z = nn.Conv2d(rd_channels, in_channels, 1)
        self.norm = nn.BatchNorm2d(in_channels)

    def logits(self, x):
        return self.t(x).flatten(2).mT @ self.p(x).flatten(2) * x.shape[1] ** -0.5

    def forward(self, x):
        y = self.g(x).flatten(2) @ self.logits(x).softmax(dim=2).mT
        return x + self.norm(self.z(y.unflatten(2, x.shape[2:])))


class GlobalContext(nn.Module):
    """The mean of all positions in place of the weighted sum."""

    def __init__(self, channels, fuse_add, fuse_scale, rd_channels):
        super().__init__()
        self.conv_attn = nn.Conv2d(channels, 1, 1)
        self.mlp_add = nn.Module()
        self.mlp_add.fc1 = nn.Conv2d(channels, rd_channels, 1)
        self.mlp_add.norm = nn.LayerNorm(rd_channels)
        self.mlp_add.fc2 = nn.Conv2d(rd_channels, channels, 1)

    def forward(self, x):
        hidden = self.mlp_add.fc1(x.mean(dim=(2, 3), keepdim=True))
        hidden = self.mlp_add.norm(hidden.movedim(1, 3)).movedim(3, 1)
        return x + self.mlp_add.fc2(F.relu(hidden))


@pytest.fixture
def only_stand_ins(monkeypatch):
    """Of the packages, timm alone can be imported, and is the classes above."""
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    layers, package = ModuleType("timm.layers"), ModuleType("timm")
    layers.NonLocalAttn, layers.GlobalContext = NonLocalAttn, GlobalContext
    package.layers, package.__version__ = layers, "0"
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.layers", layers)


@pytest.fixture
def in_this_process(monkeypatch):
    """Outputs are compared in this process; the forms that were timed are in the list."""
    timed = []
    monkeypatch.setattr(peer_comparison, "in_new_process", lambda call, case: call(case))

    def measure_in_turn(case, forms, repeats):
        timed.append(case.peer)
        runs = {"fast": (4.0, 1.0, 3.0), "peer": (2.0, 2.0, 1.0)}  # seconds
        return {form: [{"seconds": s, "bytes": 8 * s} for s in runs[form]] for form in forms}

    monkeypatch.setattr(peer_comparison, "measure_in_turn", measure_in_turn)
    return timed


def case_of(peer, pairwise, mode="training", shape=(8, 5, 7)):
    return Case("block", pairwise, shape, mode, "float32", "cpu", 2, 1, peer=peer)


def test_without_the_packages_a_sentence_says_how_to_install_them(monkeypatch):
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stop:
        main(["--peers"])
    assert stop.value.code.endswith("pip install mmcv-lite pytorchvideo timm")
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pairwise", "global_context"), "--peers"),
        (("--peers", "--shape", "8x5"), "CxHxW"),
        (("--peers", "--config-file", "a.yaml"), "not allowed"),
    ],
)
def test_wrong_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_pairwise_function_that_no_peer_has(only_stand_ins):
    with pytest.raises(SystemExit, match="timm GlobalContext has gaussian"):
        main(["--peers", "--pairwise", "gaussian"])


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_blocks_that_agree_are_timed_and_ratios_are_of_pairs(mode, only_stand_ins, in_this_process):
    row = measure_peer(case_of("timm NonLocalAttn", "embedded_gaussian", mode), repeats=3)
    assert in_this_process == ["timm NonLocalAttn"]
    assert row["seconds_ratio"] == {"median": 2.0, "min": 0.5, "max": 3.0}
    assert row["bytes_ratio"] == row["seconds_ratio"]
    assert (row["fast_seconds"], row["peer_seconds"]) == (3.0, 2.0)


class Unscaled(NonLocalAttn):
    def logits(self, x):
        return super().logits(x) * x.shape[1] ** 0.5


class Detached(NonLocalAttn):
    """The same output, without gradients through the logits."""

    def logits(self, x):
        return super().logits(x).detach()


class Broken(NonLocalAttn):
    def logits(self, x):
        raise RuntimeError("no such operator. Compile it.")


@pytest.mark.parametrize(
    ("block", "reason"),
    [(Unscaled, "differ by"), (Detached, "differ by"), (Broken, "no such operator")],
)
def test_blocks_that_differ_are_named_and_not_timed(
    block, reason, only_stand_ins, in_this_process, monkeypatch
):
    monkeypatch.setattr(sys.modules["timm.layers"], "NonLocalAttn", block)
    row = measure_peer(case_of("timm NonLocalAttn", "embedded_gaussian"), repeats=3)
    assert in_this_process == [] and "fast_seconds" not in row
    (line,) = peer_table([row], {"timm NonLocalAttn": "0"}).splitlines()[:1]
    assert (
        line.startswith("- timm 0 NonLocalAttn, embedded_gaussian block, 8x5x7") and reason in line
    )


def test_cases_are_what_a_peer_has():
    args = parse_args(["--peers", "--shape", "8x6x4", "--mode", "training"])
    found = {name: make_peer_cases(args, [name]) for name in PEERS}
    counts = {name: len(of_peer) for name, of_peer in found.items()}
    assert counts == {
        "mmcv NonLocal2d": 2 * len(PAIRWISE),
        "pytorchvideo NonLocal": 4,
        "timm NonLocalAttn": 1,
        "mmcv ContextBlock": 1,
        "timm GlobalContext": 1,
    }
    (case,) = found["timm GlobalContext"]
    assert case.pairwise == GLOBAL_CONTEXT and case.inner_channels == 1 and case.pairs == 24
    assert {case.pairs for case in found["pytorchvideo NonLocal"]} == {24 * 24, 24 * 6}


def test_cases_that_memory_cannot_hold_are_not_tried(monkeypatch, in_this_process):
    """Of 24 x 6 pairs, a concatenation in training: 2 images, 4 copies, 8 features, 4 bytes."""
    case = Case("block", "concatenation", (8, 6, 4), "training", "float32", "cpu", 2, 1)
    case = Case(**{**asdict(case), "peer": "mmcv NonLocal2d", "subsample": True})
    needed = 2 * 24 * 6 * 4 * 8 * 4
    monkeypatch.setattr(cases, "_available_memory", lambda device: needed + 1)
    assert fits_in_memory(case)
    monkeypatch.setattr(cases, "_available_memory", lambda device: needed)
    assert "memory" in measure_peer(case, 3)["not_timed"] and in_this_process == []


def test_table_and_plot(only_stand_ins, in_this_process):
    """A column of a ratio has its median and range; a missing ratio is a dash, and has no dot."""
    row = measure_peer(case_of("timm NonLocalAttn", "embedded_gaussian"), repeats=3)
    del row["bytes_ratio"]
    other = {**row, "name": "another case", "not_timed": "it ran out of memory"}
    versions = {"timm NonLocalAttn": "0"}
    table = peer_table([row, other], versions).splitlines()
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[0] == "timm 0 NonLocalAttn" and cells[4] == "2 (0.5 to 3)" and cells[7] == "-"
    assert table[0].count("|") == table[1].count("|") == table[2].count("|")
    assert "- timm 0 NonLocalAttn, another case: not timed, it ran out of memory." in table
    assert any("BatNonLocalAttn: not comparable" in line for line in table)
    time, memory = peer_plot([row, other], versions).axes
    assert [label.get_text() for label in time.get_yticklabels()] == [row["name"]]
    assert list(time.containers[0].lines[0].get_xdata()) == [2.0]
    assert len(memory.containers[0].lines[0].get_xdata()) == 0
    assert peer_plot([other], versions).axes  # nothing was timed


@pytest.mark.slow
def test_the_command_measures_what_is_installed(tmp_path):
    """With stand-ins as files; the other packages cannot be imported."""
    for package in ("mmcv", "pytorchvideo"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not here')\n")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("__version__ = '1.2'\n")
    source = "\n".join(map(inspect.getsource, (NonLocalAttn, GlobalContext)))
    imports = "from torch import nn\nimport torch.nn.functional as F\n"
    (tmp_path / "timm" / "layers.py").write_text(imports + source)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    few = ("--shape", "48x6x5", "--mode", "inference", "--repeats", 1, "--threads", 1)
    output = tmp_path / "output"
    done = run_tool("benchmark", "--peers", *few, "--output", output, env={"PYTHONPATH": path})
    assert "mmcv-lite (ImportError: not here)" in done.stdout
    assert "pip install mmcv-lite pytorchvideo\n" in done.stdout
    found = json.loads((output / "peers.json").read_text())
    agreeing, differing = found["rows"]
    assert agreeing["fast_seconds"] > 0 and agreeing["peer_seconds"] > 0
    assert "differ" in differing["not_timed"] and "fast_seconds" not in differing
    assert set(found["versions"].values()) == {"1.2"}
    assert (output / "peers.md").read_text() in done.stdout
    assert (output / "peers.png").stat().st_size > 0


# The packages themselves.


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    ("name", "pairwise"), [(name, p) for name, peer in PEERS.items() for p in peer.pairwise]
)
def test_blocks_and_peers_are_one_function_of_one_set_of_weights(name, pairwise, mode):
    """Outputs and gradients, for odd sizes; for even ones if subsampled."""
    pytest.importorskip(PEERS[name].module)
    # There, mmcv divides in place what its backward pass would need.
    differentiable = (name, pairwise) != ("mmcv NonLocal2d", "concatenation")

    @settings(max_examples=5, deadline=None)
    @given(
        *(st.integers(2, 9), st.integers(1, 5), st.integers(2, 5), st.integers(0, 2**31)),
        st.sampled_from(PEERS[name].subsample),
    )
    def check(channels, height, width, seed, subsample):
        torch.manual_seed(seed)
        # mmcv knows inner channels by a ratio.
        setting = Setting(channels, channels // 2, pairwise, subsample)
        blocks = PEERS[name].make_pair(setting)
        size = (2 * height, 2 * width) if subsample else (height, width)
        x = torch.randn(2, channels, *size)
        cotangent = torch.randn_like(x)

        def results(block, x):
            x = x.detach().requires_grad_()
            y = block.train(mode == "training")(x)
            gradients = torch.autograd.grad(y, x, cotangent) if differentiable else ()
            return [y.detach(), *gradients]

        found, expected = (results(block, x) for block in blocks)
        scale = sensitivity(results, blocks[0], x)
        for ours, theirs in zip(found, expected):
            roundings = steps_of_block(x, setting.inner_channels)
            assert_near(ours, theirs, roundings=roundings, size=scale, name=setting)
        assert (found[0] - x).abs().max() > 1e-3  # not both the identity

    torch.set_default_dtype(torch.float64)  # conversions round, too
    try:
        check()
    finally:
        torch.set_default_dtype(torch.float32)


def test_odd_sizes_that_a_package_subsamples_differ():
    """It rounds them down, ours up."""
    pytest.importorskip("mmcv.cnn")
    case = Case("block", "dot_product", (8, 5, 7), "inference", "float32", "cpu", 1, 1)
    fields = {**asdict(case), "peer": "mmcv NonLocal2d", "subsample": True}
    assert compare_outputs(Case(**fields))["relative_difference"] > 0.01
    even = Case(**{**fields, "shape": (8, 6, 4)})
    assert compare_outputs(even)["relative_difference"] < 1e-5
