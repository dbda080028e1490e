"""tools/benchmark.py runs, and says what it measured; no time is asserted.

Broken by hand, and seen to fail: stock and blocks with different weights; a step that moves
weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[1]
sys.path.insert(0, str(PROJECT / "tools"))

import benchmark_model  # noqa: E402

CONFIG = str(PROJECT / "configs" / "lamps_mask_rcnn_R18_NL.yaml")


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(PROJECT / "tools" / "benchmark.py")]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.long
def test_fast_and_dense_are_measured(tmp_path):
    case = ("--shape", "16x12x10", "--pairwise", "dot_product", "--mode", "inference")
    done = benchmark(*case, "--rounds", 1, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert row["fast_seconds"] > 0 and row["dense_seconds"] > 0 and row["matmul_rate"] > 0
    assert (tmp_path / "benchmark.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "16x"), "16x"),
        (("--pairwise", "cosine"), "cosine"),
        (("--rounds", "0"), "whole number"),
        (("--config-file", "no_such.yaml"), "no_such.yaml"),
    ],
)
def test_wrong_arguments_end_with_one_sentence(arguments, said):
    done = benchmark(*arguments)
    assert done.returncode != 0
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_stock_and_blocks_do_the_same_work():
    models = benchmark_model.build_both(CONFIG, "cpu")
    inputs = benchmark_model.random_input((64, 96), 3)
    stock, blocks = (benchmark_model.losses(models[name], inputs) for name in ("stock", "blocks"))
    assert stock.keys() == blocks.keys()
    assert all(torch.equal(stock[name], blocks[name]) for name in stock)


def test_a_training_step_moves_nothing():
    model = benchmark_model.build_both(CONFIG, "cpu")["blocks"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    benchmark_model.train(model, benchmark_model.random_input((64, 96), 3))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.long
def test_the_whole_model_is_compared():
    done = benchmark("--config-file", CONFIG, "--size", 64, 96, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " ratio " in line]
    assert [line[0] for line in lines] == ["inference", "training"]
    assert all(float(line[line.index("ratio") + 1]) > 0 for line in lines)
