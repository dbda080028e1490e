"""The small network: its tasks, that it depends on the block, and resuming its suite.

Mutations tried by hand; each makes at least one test here fail: cells of another image; lamps in
the accuracy; a run that is finished trained again; settings that do not count for a finished run.
"""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from nonlocal_det.ablation.results import read_results
from nonlocal_det.ablation.small_network import (
    STRIDE,
    TASKS,
    WIDTH,
    Examples,
    SmallNetwork,
    _accuracy,
    make_examples,
    train,
)
from nonlocal_det.ablation.small_suite import KEYS, read_small_suite
from nonlocal_det.cli import ablate_small
from nonlocal_det.modeling.block_factory import build_block


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_has_the_objects_of_its_images(task):
    examples = make_examples(task, "test", 6)
    assert len(examples.images) == 6 and examples.images.shape[2:] == (64, 320)
    chosen = torch.tensor([4, 1])
    batch = examples.batch(chosen)
    assert -1 <= batch.images.min() < -0.5 and 0.5 < batch.images.max() <= 1
    torch.testing.assert_close(batch.images[0], examples.images[4].float() / 127.5 - 1)
    for index, image in enumerate(chosen.tolist()):
        here, there = batch.cells[:, 0] == index, examples.cells[:, 0] == image
        assert torch.equal(batch.cells[here, 1:], examples.cells[there, 1:])
        assert torch.equal(batch.classes[here], examples.classes[there])
        # Each lies on an object: not the background, which is dark.
        for _, row, column in batch.cells[here].tolist():
            y, x = row * STRIDE, column * STRIDE
            assert examples.images[image, :, y : y + STRIDE, x : x + STRIDE].max() > 100
    assert 0 < examples.is_shape.sum() < len(examples.is_shape)


def test_without_a_block_a_class_depends_on_47_pixels_alone():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 320)
    cell = torch.tensor([[0, 2, 10]])  # its features are centered on x = 160
    for block, reach in ((None, 47), (build_block(WIDTH, norm=""), 320)):
        network = SmallNetwork(4, block).eval()
        if block is not None:
            torch.nn.init.normal_(block.out.weight, std=0.1)
        images.grad = None
        network(images.requires_grad_(), cell).sum().backward()
        columns = images.grad.abs().sum(dim=(0, 1, 2)).nonzero()[:, 0]
        assert (columns - 160).abs().max() <= reach
        assert (columns.max() - columns.min() > 200) == (block is not None)


def test_lamps_do_not_count():
    is_shape, classes = torch.tensor([True, False, True]), torch.tensor([2, 0, 1])
    batch = Examples(torch.zeros(1, 3, 64, 320), torch.zeros(3, 3), classes, is_shape)
    logits = torch.nn.functional.one_hot(torch.tensor([2, 1, 0]), 3).float()
    assert _accuracy(logits, batch) == 0.5


@pytest.mark.slow
def test_a_run_learns_and_repeats():
    learned = train("local", None, 1, steps=120, images=200)
    assert learned["accuracy"] > 0.5 and learned["entropy"] == {}  # 0.33 by chance
    settings = {"norm": ""}
    first, second = (train("match", settings, 1, steps=12, images=40) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert 0 < first["entropy"]["0"] < 1


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch, capsys):
    calls = []

    def fake_train(runs, jobs):
        for run in runs:
            calls.append((run.task, run.variant, run.seed))
            yield run, {"accuracy": 0.5, "learned_at": None, "entropy": {}, "seconds": 1}

    monkeypatch.setattr(ablate_small, "_train_all", fake_train)
    suite = {
        "tasks": ["far"],
        "seeds": [1, 2],
        "variants": {"none": None, "dot": {"PAIRWISE": "dot_product"}},
    }
    file, results = tmp_path / "suite.yaml", tmp_path / "results.jsonl"
    argv = ["--suite", str(file), "--results", str(results)]
    file.write_text(yaml.safe_dump(suite))
    assert ablate_small.main(argv) == 0 and len(calls) == 4
    assert ablate_small.main(argv) == 0 and len(calls) == 4
    # Other settings under the same name are another run; those of before stay.
    suite["variants"]["dot"]["NORM"] = "GN"
    suite["seeds"].append(3)
    file.write_text(yaml.safe_dump(suite))
    assert ablate_small.main(argv) == 0
    assert sorted(calls[4:]) == sorted(
        [("far", "dot", 1), ("far", "dot", 2), ("far", "none", 3), ("far", "dot", 3)]
    )
    assert len(read_results(str(results), KEYS)) == 8
    said = capsys.readouterr().out
    assert "| none | 50.0 | 50.0 | 0 of 3 |" in said


def test_the_shipped_suite_can_be_built():
    suite = read_small_suite("ablation/small_network")
    assert len(suite.runs()) == len(suite.tasks) * len(suite.seeds) * len(suite.variants)
    assert len(suite.seeds) >= 8 and set(suite.tasks) < set(TASKS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ["near"]}, "'near'; it must be one of 'match', 'far', 'local', 'tones'"),
        ({"variants": {"a": {"SCALEE": True}}}, "The variant 'a' of .*SCALEE"),
        ({"variants": {"a": {"PAIRWISE": "dot_product", "SCALE": True}}}, "scale is for the softm"),
        ({"seeds": []}, r"'seeds' of .* is \[\]; it must be a list of at least one"),
        ({"seeds": ["a"]}, r"The seeds of .* are \['a'\]; they must be integers"),
        ({"variants": ["none"]}, r"it must be a dict of at least one"),
        ({"config": "a.yaml"}, "is no suite of the small network; it needs tasks, variants, seeds"),
    ],
)
def test_a_wrong_suite_is_told_before_anything_is_trained(tmp_path, change, said):
    suite = {"tasks": ["far"], "seeds": [1], "variants": {"none": None}, **change}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises(ValueError, match=said):
        read_small_suite(str(tmp_path / "suite.yaml"))


def test_a_line_that_is_no_result_is_named(tmp_path):
    file = tmp_path / "results.jsonl"
    whole = {"task": "far", "variant": "a", "settings": None, "seed": 1, "accuracy": 1.0}
    whole.update(learned_at=None, entropy={})
    for line in ("nothing", "[]", json.dumps({"task": "far"})):
        file.write_text(f"{json.dumps(whole)}\n{line}\n")
        with pytest.raises(ValueError, match=r"Line 2 of .*s.jsonl' is not the result of a run"):
            read_results(str(file), KEYS)
