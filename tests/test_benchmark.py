"""``nonlocal-det benchmark`` runs and reports what it measured; no time is asserted.

Mutations tried by hand; each makes at least one test here fail: baseline and blocks with different
weights; a step that changes weights; a dense form of other logits.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import OURS, renamed, zoo_config
from tool_process import run_tool

from nonlocal_det.benchmark import detector
from nonlocal_det.benchmark.cases import Case, make_function, minimum_operations, precision
from nonlocal_det.cli.benchmark import main, make_cases, parse_args
from nonlocal_det.layers import PAIRWISE
from nonlocal_det.layers.non_local import SOFTMAX

PROJECT = Path(__file__).parents[1]
CONFIG = str(PROJECT / "configs" / "lamps_mask_rcnn_R18_NL.yaml")


@pytest.mark.slow
def test_fast_and_dense_are_measured(tmp_path):
    case = ("--shape", "16x12x10", "--pairwise", "dot_product", "--mode", "inference")
    run_tool("benchmark", *case, "--repeats", 1, "--output", tmp_path)
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert row["fast_seconds"] > 0 and row["dense_seconds"] > 0 and row["matmul_rate"] > 0
    assert (tmp_path / "benchmark.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "16x"), "16x"),
        (("--pairwise", "cosine"), "cosine"),
        (("--repeats", "0"), "at least 1"),
        (("--config-file", "no_such.yaml"), "no_such.yaml"),
    ],
)
def test_wrong_arguments_end_with_one_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    last = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code and said in last.strip().splitlines()[-1]


CASE = Case("aggregation", "gaussian", (8, 5, 7), "training", "float32", "cpu", 2, 1)


@pytest.mark.parametrize("subsample", [False, True])
@pytest.mark.parametrize("pairwise", PAIRWISE)
@pytest.mark.parametrize("target", ["aggregation", "block"])
def test_all_forms_are_one_function(target, pairwise, subsample):
    """Outputs and gradients, of the same inputs and weights."""
    results = []
    for form in ("fast", "dense", "sdpa") if pairwise in SOFTMAX else ("fast", "dense"):
        torch.manual_seed(0)
        case = replace(CASE, target=target, pairwise=pairwise, form=form, subsample=subsample)
        function, inputs = make_function(case)
        if target == "block":
            torch.nn.init.normal_(function.out.weight, generator=torch.Generator().manual_seed(1))
        y = function(*inputs)
        y.sin().sum().backward()
        results.append([y, *(x.grad for x in inputs)])
    fast, *others = results
    for other in others:
        for ours, theirs in zip(fast, other):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_minimum_operations_by_hand():
    """N = 35 positions, C = 8 channels, D = 4, two images, backward as two more passes."""
    assert minimum_operations(CASE) == 2 * 3 * 2 * 35 * 35 * (8 + 4)
    block = replace(CASE, target="block", pairwise="concatenation", mode="inference")
    assert minimum_operations(block) == 2 * 4 * 2 * 35 * 8 * 4
    subsampled = replace(CASE, subsample=True)  # to 3 x 4 keys
    assert minimum_operations(subsampled) == 2 * 3 * 2 * 35 * 12 * (8 + 4)


def test_tf32_is_allowed_for_its_own_dtype_alone_and_settings_come_back():
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in settings]
    for dtype in ("float32", "tf32", "float16"):
        with pytest.raises(KeyError), precision(dtype):
            assert [backend.allow_tf32 for backend in settings] == [dtype == "tf32"] * 2
            raise KeyError
        assert [backend.allow_tf32 for backend in settings] == before


def test_former_options_work_and_name_the_new_ones():
    former = ["--what", "sums", "block", "--batch", "2", "--rounds", "5", "--fast-only"]
    with pytest.warns(FutureWarning) as warned:
        old = parse_args(former)
    new = parse_args(
        ["--target", "aggregation", "block", "--batch-size", "2", "--repeats", "5", "--skip-dense"]
    )
    assert vars(old) == vars(new) and make_cases(old) == make_cases(new)
    said = " ".join(str(warning.message) for warning in warned)
    for name in ("--target", "--target aggregation", "--batch-size", "--repeats", "--skip-dense"):
        assert f"is now {name}" in said


def test_baseline_and_blocks_do_the_same_work():
    models = detector.build_both(CONFIG, "cpu")
    inputs = detector.random_input((64, 96), 3)
    baseline, blocks = (
        detector.training_losses(models[name], inputs) for name in ("baseline", "blocks")
    )
    assert baseline.keys() == blocks.keys()
    assert all(torch.equal(baseline[name], blocks[name]) for name in baseline)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_training_step_changes_no_weight(mixed):
    model = detector.build_both(CONFIG, "cpu")["blocks"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    detector.train_step(model, detector.random_input((64, 96), 3), mixed)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "path",
    [
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-Detection/rpn_R_50_FPN_1x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    ],
)
def test_detectors_of_all_kinds_can_be_measured(path, tmp_path):
    cfg = zoo_config(path, ["MODEL.NONLOCAL.POSITIONS", ["res4[-2]"]])
    # With frozen statistics, which fit no data, keypoint heatmaps would overflow.
    groups = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 32]
    cfg.merge_from_list(["MODEL.RESNETS.NORM", "GN", *groups])
    (tmp_path / "tiny.yaml").write_text(renamed(cfg, OURS).dump())
    lines = list(detector.time_detector(str(tmp_path / "tiny.yaml"), (64, 96), 1, "cpu"))
    assert [line.split()[0] for line in lines] == ["inference", "training"]


@pytest.mark.slow
def test_a_whole_detector_is_measured():
    done = run_tool("benchmark", "--config-file", CONFIG, "--size", 64, 96, "--repeats", 1)
    lines = [line.split() for line in done.stdout.splitlines() if " ratio " in line]
    assert [line[0] for line in lines] == ["inference", "training"]
    assert all(float(line[line.index("ratio") + 1]) > 0 for line in lines)
