"""Ablation: AP by distance, receptive field, intervals, suites, and a real small study.

Mutations tried by hand; each makes at least one test here fail: the area of a
detection left as it is; ranges that include both of their ends; the nearest cue
in place of an object's own; an overlap with objects of the same class alone; differences of means,
unpaired; a suite that trains finished runs again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from detectron2.modeling import build_model
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_training import write_short_lamps

from nonlocal_det.ablation import runs
from nonlocal_det.ablation.distance_ap import ap_by_distance, class_agnostic_ap
from nonlocal_det.ablation.evaluate import evaluate_run
from nonlocal_det.ablation.receptive_field import receptive_field_radius
from nonlocal_det.ablation.results import read_results
from nonlocal_det.ablation.runs import (
    KEYS,
    RESULT,
    check_runs,
    missing_runs,
    results_of,
    train,
)
from nonlocal_det.ablation.statistics import (
    has_learned,
    overall_table,
    paired_difference,
    tables,
)
from nonlocal_det.ablation.suite import Suite, read_suite
from nonlocal_det.cli.ablate import chosen, main, parse_args
from nonlocal_det.config import load_config, settings_digest
from nonlocal_det.data import ensure_dataset, register_lamps
from nonlocal_det.data.lamps.writer import annotation_file
from nonlocal_det.modeling.supported_positions import check_positions

PROJECT = Path(__file__).parents[1]
SUITES = sorted((PROJECT / "configs" / "ablation").glob("lamps*.yaml"))
CONFIG = PROJECT / "configs" / "Base-Lamps-Faster-RCNN-C4.yaml"


# ---- AP by distance


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("truth") / "lamps"
    ensure_dataset(str(folder), {"val": 30})
    return str(folder / "annotations" / "instances_val.json")


def detections(json_file: str, seed: int = 0) -> list[dict[str, Any]]:
    """Every object, shifted and scored at random, some under another name; and some of nothing."""
    rng = np.random.default_rng(seed)
    found = []
    for annotation in json.loads(Path(json_file).read_text())["annotations"]:
        box = np.array(annotation["bbox"])
        box[:2] += rng.normal(0, 0.08, 2) * box[2:]
        category = annotation["category_id"] if rng.random() < 0.8 else rng.integers(1, 4)
        for shift in (0, 60) if rng.random() < 0.3 else (0,):
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(category),
                    "bbox": [*(box[:2] + shift).tolist(), *box[2:].tolist()],
                    "score": float(rng.random()),
                }
            )
    return found


def test_one_range_for_all_is_cocos_own_ap(truth: str) -> None:
    found = detections(truth)
    coco = COCO(truth)
    evaluation = COCOeval(coco, coco.loadRes([dict(d) for d in found]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    (every,) = ap_by_distance(truth, found, (0, 1e5))
    assert every["count"] == len(coco.anns)
    assert every["AP"] == pytest.approx(100 * evaluation.stats[0], abs=1e-9)
    assert every["AP50"] == pytest.approx(100 * evaluation.stats[1], abs=1e-9)
    assert 20 < every["AP"] < 90


def test_what_is_wrong_at_one_distance_counts_there_alone(truth: str) -> None:
    content = json.loads(Path(truth).read_text())
    found = [
        {
            "image_id": a["image_id"],
            # Far objects are all given one name.
            "category_id": a["category_id"] if a["cue_distance"] < 60 else 1,
            "bbox": a["bbox"],
            "score": 0.9,
        }
        for a in content["annotations"]
    ]
    near, far = ap_by_distance(truth, found, (0, 60, 1e5))
    assert near["AP"] == pytest.approx(100)
    assert far["AP"] < 40
    assert near["count"] + far["count"] == len(content["annotations"])
    assert near["count"] == sum(a["cue_distance"] < 60 for a in content["annotations"])


def test_whatever_the_class(truth: str) -> None:
    """Wrong names do not matter, wrong boxes do."""
    found = detections(truth)
    named = [{**d, "category_id": 1 + i % 3} for i, d in enumerate(found)]
    (every,) = ap_by_distance(truth, found, (0, 1e5))
    assert class_agnostic_ap(truth, found) == class_agnostic_ap(truth, named) > every["AP"] + 5
    boxes = [{**d, "bbox": [0, 0, 5, 5]} for d in found]
    assert class_agnostic_ap(truth, boxes) < 1 and class_agnostic_ap(truth, []) == 0


def test_nothing_found_and_nothing_asked_for(truth: str) -> None:
    nearer, farther = ap_by_distance(truth, [], (0, 1e4, 2e4))
    assert (nearer["AP"], farther["count"]) == (0, 0) and math.isnan(farther["AP"])


def found_as(box: list[float], category: int, score: float = 0.9) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "bbox": box, "score": score}


@pytest.fixture
def several_cues(tmp_path: Path) -> str:
    """One image with two cues, at x = 50 and 450.

    Object A, at x = 60, has the second, 390 pixels away, as its cue; B, at x = 410, too, 40 away; C
    at x = 100 has none. Another image has no cue at all.
    """
    boxes = {"A": [50, 40, 20, 20], "B": [400, 40, 20, 20], "C": [90, 40, 20, 20]}
    cue_of = {"A": [450, 50], "B": [450, 50], "C": None}
    objects = [
        {"image_id": 1, "category_id": 1 if cue_of[n] else 3, "bbox": boxes[n]}
        | {"id": i, "area": 400, "iscrowd": 0, "cue_xy": cue_of[n]}
        for i, n in enumerate(boxes, start=1)
    ]
    objects.append({**objects[2], "id": 4, "image_id": 2})
    content = {
        "images": [{"id": 1, "cues": [[50, 50], [450, 50]]}, {"id": 2, "cues": []}],
        "annotations": objects,
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
    }
    file = tmp_path / "several.json"
    file.write_text(json.dumps(content))
    return str(file)


A, B, C = [50, 40, 20, 20], [400, 40, 20, 20], [90, 40, 20, 20]
EDGES = (0, 100, 300, 500)  # B is in the first range, A in the last


@pytest.mark.parametrize(
    ("detections", "near", "far"),
    [
        ([found_as(A, 1), found_as(B, 1), found_as(C, 3)], 100, 100),
        ([found_as(A, 2), found_as(B, 1)], 100, 0),  # A has another class
        # A false positive of its class, with a larger score, halves the precision: where the object
        # lies that it overlaps, of whichever class; at C, nowhere; on free ground, at the nearest
        # cue, 30 pixels away.
        ([found_as([55, 45, 30, 30], 1, 0.95), found_as(A, 1), found_as(B, 1)], 100, 50),
        ([found_as([405, 45, 30, 30], 1, 0.95), found_as(A, 1), found_as(B, 1)], 50, 100),
        ([found_as(C, 1, 0.95), found_as(A, 1), found_as(B, 1)], 100, 100),
        ([found_as([10, 0, 20, 20], 1, 0.95), found_as(A, 1), found_as(B, 1)], 50, 100),
        (
            [{**found_as(C, 1, 0.95), "image_id": 2}, found_as(A, 1), found_as(B, 1)],
            100,
            100,
        ),
    ],
)
def test_with_several_cues_each_object_has_its_own(
    several_cues: str, detections: list[dict[str, Any]], near: float, far: float
) -> None:
    first, between, last = ap_by_distance(several_cues, detections, EDGES)
    assert [first["count"], between["count"], last["count"]] == [1, 0, 1]
    assert (first["AP50"], last["AP50"]) == pytest.approx((near, far))
    assert math.isnan(between["AP"])


def test_one_cue_in_a_list_is_as_one_cue(truth: str, tmp_path: Path) -> None:
    content = json.loads(Path(truth).read_text())
    cues = {image["id"]: image.pop("cue_xy") for image in content["images"]}
    for image in content["images"]:
        image["cues"] = [cues[image["id"]]]
    for annotation in content["annotations"]:
        annotation["cue_xy"] = cues[annotation["image_id"]]
    (tmp_path / "listed.json").write_text(json.dumps(content))
    found, edges = detections(truth), (0, 40, 70, 1e5)
    listed = ap_by_distance(str(tmp_path / "listed.json"), found, edges)
    assert listed == ap_by_distance(truth, found, edges)


def test_a_dataset_without_cues_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plain.json"
    file.write_text(json.dumps({"images": [{"id": 1}], "annotations": [], "categories": []}))
    with pytest.raises(ValueError, match="cue_xy"):
        ap_by_distance(str(file), [], (0, 10))


# ---- receptive field


def test_receptive_field_is_that_of_the_convolutions() -> None:
    """By hand, at res4 of R50: 7 + 2 x 2 (pool) + 3 x 2 x 4 (res2) + 4 x 2 x 8 + 6 x 2 x 16.

    That is 291 pixels, 145 to a side of a cell; and pooling looks at cells around the box, the
    nearest sample in it being half a bin, 44 / 6 pixels, inside its edge.
    """
    model = build_model(load_config(str(CONFIG)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # Stem, pooling, and the four convolutions of each stage, at the stride of their inputs.
    side = (7 + 2 * 2 + 4 * 2 * 4 + (4 + 3 * 8) * 2 + (8 + 3 * 16) * 2 - 1) / 2
    assert side == 105
    distance = receptive_field_radius(model, 44, width=512)
    nearest = side + 44 / 2 - 44 / 6
    assert nearest <= distance <= nearest + 2 * 16
    assert model.training and all(
        (value == before[n]).all() for n, value in model.state_dict().items()
    )


def test_a_block_sees_everything() -> None:
    cfg = load_config(str(CONFIG), ["MODEL.NONLOCAL.POSITIONS", "('res4[-2]',)"])
    assert receptive_field_radius(build_model(cfg), 44, width=512) >= 512 - 44 / 2 - 1


# ---- intervals


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 2, 6: mean 3, deviation sqrt(7), t(2) = 4.303."""
    found = paired_difference({1: 11, 2: 22, 3: 36, 9: 0}, {3: 30, 2: 20, 1: 10, 7: 5})
    half = 4.303 * math.sqrt(7) / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-3)
    assert str(found) == "+3.0 [-3.6, +9.6]"


def test_a_difference_of_aps_over_no_objects_is_undefined() -> None:
    assert str(paired_difference({1: math.nan, 2: 5}, {1: 3, 2: 3})) == "undefined"


def test_one_pair_has_no_interval() -> None:
    found = paired_difference({1: 5.0}, {1: 4.0})
    assert found.mean == 1 and math.isnan(found.low) and str(found) == "+1.0"
    with pytest.raises(ValueError, match="0 pairs"):
        paired_difference({1: 5.0}, {2: 4.0})


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (11, 2.201), (12, 2.179), (30, 2.042), (100, 1.984)]
)
def test_quantiles_are_those_of_printed_tables(freedom: int, t: float) -> None:
    values = [float(seed**2 % 7) for seed in range(freedom + 1)]
    found = paired_difference(dict(enumerate(values)), dict.fromkeys(range(freedom + 1), 0.0))
    error = statistics.stdev(values) / math.sqrt(freedom + 1)
    assert (found.high - found.low) / 2 / error == pytest.approx(t, abs=5e-4)


@pytest.mark.parametrize("seeds", [2, 3, 5, 11, 12, 30])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    held, trials = 0, 4000
    for row in rng.normal(1.0, 2.0, (trials, seeds)):
        difference = paired_difference(dict(enumerate(row)), dict.fromkeys(range(seeds), 0.0))
        held += difference.low <= 1.0 <= difference.high
    # Four standard deviations of that share.
    assert abs(held / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


# ---- tables


def result(task: str, variant: str, seed: int, ap50: float, count: int = 0) -> dict[str, Any]:
    ranges = {"low": 1, "high": 9, "count": count, "AP": 50.0}
    return {
        "task": task,
        "variant": variant,
        "seed": seed,
        "metrics": {
            "bbox/AP": ap50 - 20,
            "bbox/AP50": ap50,
            "bbox/AP75": ap50 / 2,
            "bbox/AP-any-class": 80.0,
        },
        "learned_at": seed,
        "by_distance": [ranges],
        "beyond_reach": {**ranges, "count": count + 1},
    }


def test_a_table_has_the_aps_and_the_number_of_seeds_that_learned() -> None:
    ap50s = {"stock": (94.9, 40.0, 30.0), "block": (95.0, 100.0, 30.0)}
    results = [
        result("far", variant, seed, ap50)
        for variant, values in ap50s.items()
        for seed, ap50 in enumerate(values, start=1)
    ]
    results[-2]["learned_at"] = None  # 100.0
    assert [has_learned(run) for run in results] == [False] * 3 + [True, False, False]
    head, _, stock, block = overall_table(results, "stock").splitlines()
    names = ["variant", "AP", "difference", "AP75", "difference", "AP50", "AP, any class"]
    assert cells(head) == [*names, "learned", "by iteration"]
    columns = [1, 3, 5, 6]
    assert [cells(stock)[i].split()[0] for i in columns] == ["35.0", "27.5", "55.0", "80.0"]
    # Differences of AP 0.1, 60 and 0, of AP75 half of that.
    assert [cells(block)[i].split()[0] for i in (2, 4)] == ["+20.0", "+10.0"]
    assert cells(stock)[7:] == ["0 of 3", ""] and cells(block)[7:] == ["1 of 3", "1"]


def test_tables_of_unfinished_suites() -> None:
    """Differences are over the seeds that both have; without one there are none."""
    results = [result("far", "block", seed, 90) for seed in (1, 2)]
    report = {"baseline": "stock", "costs": {"stock": COSTS}, "reach": 200}
    *_, block = overall_table(results, "stock").splitlines()
    assert cells(block)[2] == "" and "block" in tables(report, results)
    results.append(result("far", "stock", 2, 80))
    *_, block, _ = overall_table(results, "stock").splitlines()
    assert cells(block)[2] == "+10.0"


def test_a_table_by_distance_counts_the_objects_of_its_own_task() -> None:
    results = [result("far", "stock", 1, 90, count=7), result("match", "stock", 1, 90, count=3)]
    text = tables({"baseline": "stock", "costs": {"stock": COSTS}, "reach": 200}, results)
    for task, counts in (("far", ["7", "8"]), ("match", ["3", "4"])):
        _, _, of_task = text.partition(f"Task: {task}")
        objects = next(line for line in of_task.splitlines() if line.startswith("| objects"))
        assert cells(objects) == ["objects", *counts]


COSTS = {"parameters": 1, "flops": 1, "seconds": 1, "bytes": 1}


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def test_a_run_has_learned_when_most_objects_are_classified_rightly(tmp_path: Path) -> None:
    """The first recorded iteration counts; the accuracy is that of the last three records."""
    accuracies = [0.3, 0.94, 0.96, 0.9, 0.98, 1.0]
    records = [
        {"iteration": 20 * i + 19, "fast_rcnn/fg_cls_accuracy": value}
        for i, value in enumerate(accuracies)
    ]
    records[1] |= {"health/res4.nl0/entropy": 0.5, "health/res4.nl1/entropy": 0.7}
    records.append({"iteration": 120, "bbox/AP": 60.0, "bbox/APs": 1.0, "bbox/AP50": 90.0})
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, records)))
    found = evaluate_run(str(tmp_path), ())
    assert found == {
        "metrics": {"bbox/AP": 60.0, "bbox/AP50": 90.0},
        "learned_at": 60,
        "accuracy": 0.96,
        "entropy": {"40": 0.6},
    }


# ---- suites


@pytest.mark.slow
@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_every_run_of_a_shipped_suite_can_be_built(file: Path) -> None:
    suite = read_suite(str(file))
    folders = set()
    for run in suite.runs():
        folders.add(run.folder)
        if run.seed == suite.seeds[0]:
            cfg = load_config(suite.config, [*run.options, "MODEL.DEVICE", "cpu"])
            check_positions(cfg)
            build_model(cfg)
    assert (
        len(folders)
        == len(suite.runs())
        == len(suite.seeds) * len(suite.tasks) * len(suite.variants)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variants": None}, "variants"),
        ({"baseline": "stok"}, "'stock'"),
        ({"seedz": [1]}, "'seedz'"),
        ({"config": "no_such.yaml"}, "no_such.yaml"),
        ({"seeds": []}, "seeds"),
        ({"seeds": "12"}, "'12'; they must be a list of integers"),
        ({"seeds": [1, True]}, "they must be a list of integers"),
        ({"seeds": [1, 2, 1]}, "would share the folder"),
        ({"tasks": {"far": None}}, "'far' among the tasks .* is None; it must be the options"),
        ({"tasks": {7: {}}}, "7 among the tasks .* cannot name a folder"),
        ({"variants": {"stock": {}, "../x": {}}}, "'../x' among the variants"),
        ({"variants": {"stock": {}, "..": {}}}, "'..' among the variants"),
        (
            {"variants": {"stock": {}, "a b": {}, "a_b": {}}},
            "would share the folder 'far/a_b/seed1': .*'a b'.*'a_b'",
        ),
        ({"variants": {"stock": {}, "Stock": {}}}, "would share the folder"),
        ({"pretraining": {"tones": None}}, "'tones' among the pretraining"),
        ({"_BASE_": "no_such.yaml"}, "no_such.yaml', which does not exist"),
    ],
)
def test_a_wrong_suite_says_so(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = {
        "config": str(CONFIG),
        "seeds": [1],
        "baseline": "stock",
        "tasks": {"far": {}},
        "variants": {"stock": {}},
    }
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_suite(str(file))


def test_a_suite_has_the_parts_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("VERSION: 2")
    content = {"config": "config.yaml", "seeds": [1, 2], "baseline": "a", "tasks": {"far": {}}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**content, "variants": {"a": {}}}))
    own = {"_BASE_": "base.yaml", "seeds": [3], "variants": {"a": {}, "b": {}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    suite = read_suite(str(tmp_path / "own.yaml"))
    assert [(r.task, r.variant, r.seed) for r in suite.runs()] == [("far", "a", 3), ("far", "b", 3)]
    assert suite.config == str(tmp_path / "config.yaml")
    (tmp_path / "base.yaml").write_text("[]")
    with pytest.raises(ValueError, match="base.yaml' is not a suite"):
        read_suite(str(tmp_path / "own.yaml"))


# ---- folders of runs


@pytest.fixture
def suite_of_one_run(tmp_path: Path) -> dict[str, Any]:
    """Content of a suite of one run, which would fail if it were trained."""
    return {
        "config": str(CONFIG),
        "seeds": [1],
        "baseline": "stock",
        "tasks": {"near": {"DATASETS.TRAIN": [], "DATASETS.TEST": []}},
        "variants": {"stock": {"MODEL.WEIGHTS": "missing.pth"}},
    }


def write_suite(folder: Path, content: dict[str, Any]) -> Suite:
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return read_suite(str(file))


def leave_finished_run(suite: Suite, output: Path) -> dict[str, Any]:
    """Write what a finished training leaves: its configuration, as set up, and a result."""
    (run,) = suite.runs()
    folder = output / run.folder
    folder.mkdir(parents=True)
    cfg = load_config(suite.config, [*run.options, "OUTPUT_DIR", str(folder)])
    cfg.MODEL.DEVICE = "cpu"
    (folder / "config.yaml").write_text(cfg.dump())
    result = {**dict.fromkeys(KEYS), "task": run.task, "variant": run.variant, "seed": run.seed}
    (folder / RESULT).write_text(json.dumps(result))
    return result


def test_finished_runs_of_the_same_configuration_are_kept(tmp_path, suite_of_one_run) -> None:
    suite = write_suite(tmp_path, suite_of_one_run)
    result = leave_finished_run(suite, tmp_path)
    assert train(suite, suite.runs()[0], str(tmp_path), 1, 0) == result


def test_a_file_of_results_counts_on_any_machine(tmp_path, suite_of_one_run) -> None:
    """Also after new seeds; not for other settings, nor for another pretraining."""
    content = suite_of_one_run
    content["pretraining"] = {"other": {"SOLVER.MAX_ITER": 5}}
    content["tasks"]["tuned"] = {**content["tasks"]["near"], "MODEL.WEIGHTS": "other"}
    content["variants"]["stock"] = {}
    suite = write_suite(tmp_path, content)
    near, tuned = missing_runs(suite, [], 0)
    assert suite.pretraining_of(near) is None
    assert suite.pretraining_of(tuned).folder == "pretraining/other/seed1"
    results = [
        {"task": run.task, "variant": run.variant, "seed": 1, "settings": runs._digest(suite, run)}
        for run in (near, tuned)
    ]
    assert results[0]["settings"] != results[1]["settings"]
    content["seeds"] = [1, 2]
    more = write_suite(tmp_path, content)
    assert [(run.task, run.seed) for run in missing_runs(more, results, 0)] == [
        ("near", 2),
        ("tuned", 2),
    ]
    content["pretraining"]["other"]["SOLVER.MAX_ITER"] = 6
    with pytest.raises(ValueError, match="run of 'tuned', 'stock', seed 1, of another conf"):
        missing_runs(write_suite(tmp_path, content), results, 0)
    content["tasks"]["near"]["SOLVER.MAX_ITER"] = 6
    with pytest.raises(ValueError, match="run of 'near', 'stock', seed 1, of another conf"):
        missing_runs(write_suite(tmp_path, content), results, 0)


def test_a_digest_is_that_of_the_settings_alone() -> None:
    """Neither of the machine, nor of the folder, nor of a default that is written out."""
    digest = settings_digest(load_config(str(CONFIG)))
    for same in (
        ["MODEL.DEVICE", "cuda"],
        ["OUTPUT_DIR", "elsewhere"],
        ["MODEL.NONLOCAL.GROUPS", 1],
    ):
        assert settings_digest(load_config(str(CONFIG), same)) == digest
    assert settings_digest(load_config(str(CONFIG), ["MODEL.NONLOCAL.GROUPS", 2])) != digest


def test_results_at_other_distances_are_refused(tmp_path, suite_of_one_run) -> None:
    """They depend on the baseline, whose receptive field is the last range's beginning."""
    suite = write_suite(tmp_path, {**suite_of_one_run, "distances": [1, 100, 512]})
    (run,) = suite.runs()
    ranges = {"by_distance": [{"low": 1}, {"low": 100}], "beyond_reach": {"low": 176}}
    found = {"task": "near", "variant": "stock", "seed": 1, "settings": runs._digest(suite, run)}
    assert missing_runs(suite, [{**found, **ranges}], 176) == []
    with pytest.raises(ValueError, match="of another suite, with other distances"):
        missing_runs(suite, [{**found, **ranges}], 539)
    with pytest.raises(ValueError, match="of another suite, with other distances"):
        missing_runs(suite, [found], 176)


def test_runs_of_another_configuration_are_refused(tmp_path, suite_of_one_run, capsys) -> None:
    """Also unfinished ones: they would resume from a checkpoint of the other."""
    suite = write_suite(tmp_path, suite_of_one_run)
    leave_finished_run(suite, tmp_path)
    base = tmp_path / "base.yaml"
    base.write_text(f"_BASE_: {CONFIG}\nSOLVER: {{BASE_LR: 0.125}}\n")
    option = {"stock": {**suite_of_one_run["variants"]["stock"], "SOLVER.MAX_ITER": 7}}
    changes = [
        ({"config": str(base)}, r"SOLVER.BASE_LR was [\d.]+, is 0.125"),
        ({"variants": option}, r"SOLVER.MAX_ITER was \d+, is 7"),
    ]
    for _ in ("finished", "unfinished"):
        for change, said in changes:
            changed = write_suite(tmp_path, {**suite_of_one_run, **change})
            said = f"near/stock/seed1' has a run of another configuration: {said}. Move it"
            with pytest.raises(ValueError, match=said):
                train(changed, changed.runs()[0], str(tmp_path), 1, 0)
            with pytest.raises(SystemExit, match=said):
                main(["--suite", changed.file, "--output", str(tmp_path)])
        (tmp_path / suite.runs()[0].folder / RESULT).unlink(missing_ok=True)
    assert capsys.readouterr().out == ""


def test_files_of_no_run_are_kept(tmp_path, suite_of_one_run) -> None:
    suite = write_suite(tmp_path, suite_of_one_run)
    folder = tmp_path / suite.runs()[0].folder
    folder.mkdir(parents=True)
    check_runs(suite, suite.runs(), str(tmp_path))
    for name in ("output.txt", RESULT, "metrics.json"):
        (folder / name).write_text("of the user")
        with pytest.raises(SystemExit, match="near/stock/seed1' has files that are of no run"):
            main(["--suite", suite.file, "--output", str(tmp_path)])
        assert [f.name for f in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "of the user"
        (folder / name).unlink()


def test_a_run_that_ended_at_once_starts_again(tmp_path, suite_of_one_run) -> None:
    suite = write_suite(tmp_path, suite_of_one_run)
    folder = tmp_path / suite.runs()[0].folder
    folder.mkdir(parents=True)
    (folder / "output.txt").write_text("$ python -m nonlocal_det train\n")
    check_runs(suite, suite.runs(), str(tmp_path))


# ---- a study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder of a finished study, with suite.yaml, output and datasets; the parts of the suite."""
    folder = tmp_path_factory.mktemp("study")
    datasets = write_short_lamps(folder / "datasets")
    few: dict[str, Any] = {"DATASETS.TRAIN": ["lamps_train"], "DATASETS.TEST": ["lamps_val"]}
    few |= {"SOLVER.MAX_ITER": 4, "SOLVER.IMS_PER_BATCH": 2}
    content = {
        "config": str(CONFIG),
        "seeds": [1],
        "baseline": "stock",
        "distances": [0, 50, 300],
        "tasks": {"near": {**few, "MODEL.WEIGHTS": "other"}},
        "pretraining": {"other": {**few, "SOLVER.MAX_ITER": 1}},
        "variants": {"stock": {}, "one block": {"MODEL.NONLOCAL.POSITIONS": ["res4[-2]"]}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(datasets))
        register_lamps()
        write_suite(folder, content)
        main(study_arguments(folder))
        yield folder, content


def study_arguments(folder: Path) -> list[str]:
    return [
        "--suite",
        str(folder / "suite.yaml"),
        "--output",
        str(folder / "output"),
        "--jobs",
        "1",
    ]


def test_a_part_of_a_suite_can_be_trained() -> None:
    suite = read_suite(str(PROJECT / "configs" / "ablation" / "lamps.yaml"))

    def runs_with(*options: str) -> list[tuple[str, str, int]]:
        args = parse_args(["--suite", suite.file, *options])
        return [(run.task, run.variant, run.seed) for run in chosen(suite, suite.runs(), args)]

    assert len(runs_with()) == len(suite.runs())
    assert runs_with("--tasks", "far", "--variants", "no block", "--seeds", "2", "1") == [
        ("far", "no block", 1),
        ("far", "no block", 2),
    ]
    with pytest.raises(
        ValueError, match="--variants of .* is 'near'; it must be one of 'no block'"
    ):
        runs_with("--variants", "near")


@pytest.mark.slow
def test_a_study_from_training_to_tables(study) -> None:
    folder, _ = study
    output = folder / "output"
    truth = Path(annotation_file(str(folder / "datasets" / "lamps"), "val"))
    num_objects = len(json.loads(truth.read_text())["annotations"])
    results = read_results(str(output / "results.jsonl"), KEYS)
    assert [run["variant"] for run in results] == ["stock", "one block"]
    for run in results:
        assert {"bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/AP-any-class"} == run["metrics"].keys()
        assert run["learned_at"] is None and 0 <= run["accuracy"] <= 1
        assert list(run["entropy"]) == ([] if run["variant"] == "stock" else ["4"])
        assert sum(r["count"] for r in run["by_distance"]) == num_objects
        assert run["run"]["seed"] == 1 and run["run"]["command"]
        run_folder = output / "near" / run["variant"].replace(" ", "_") / "seed1"
        log = (run_folder / "output.txt").read_text()
        assert log.startswith("$ ")
        assert "pretraining/other/seed1/model_final.pth ..." in log


@pytest.mark.slow
def test_the_report_of_a_study(study) -> None:
    output = study[0] / "output"
    report = json.loads((output / "report.json").read_text())
    assert list(report["costs"]) == ["stock", "one block"]
    stock, block = report["costs"]["stock"], report["costs"]["one block"]
    # theta, phi, g and out of 256 channels, 128 inner; biases, or a norm's; the cosines' factor.
    assert block["parameters"] - stock["parameters"] == 4 * 256 * 128 + 3 * 128 + 2 * 256 + 1
    assert block["flops"] > stock["flops"] and block["bytes"] > stock["bytes"]
    assert (output / "distance.png").stat().st_size > 10_000
    results = read_results(str(output / "results.jsonl"), KEYS)
    assert (output / "tables.md").read_text() == tables(report, results)


@pytest.mark.slow
def test_another_suite_does_not_take_the_runs_of_a_study(study) -> None:
    """Its files are not overwritten, nor its runs taken for this one's."""
    folder, content = study
    changed = {
        "stock": {},
        "one block": {**content["variants"]["one block"], "SOLVER.BASE_LR": 0.5},
    }
    write_suite(folder, {**content, "variants": changed})
    with pytest.raises(SystemExit, match="'one block', seed 1, of another configuration"):
        main(study_arguments(folder))
    with pytest.raises(SystemExit, match="SOLVER.BASE_LR was .*, is 0.5"):
        main([*study_arguments(folder), "--results", str(folder / "none.jsonl")])
    write_suite(folder, content)


@pytest.mark.slow
def test_a_finished_study_trains_nothing(study, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither again, nor on another machine with the file of results alone, nor for a report."""
    folder, content = study
    output, elsewhere = folder / "output", folder / "elsewhere"
    files = sorted(output.rglob(RESULT))
    times = [file.stat().st_mtime_ns for file in files]
    main(study_arguments(folder))
    assert [file.stat().st_mtime_ns for file in files] == times and len(times) == 3
    assert "one block" in capsys.readouterr().out

    there = ["--output", str(elsewhere), "--results", str(output / "results.jsonl")]
    main([*study_arguments(folder), *there])
    assert not (elsewhere / "near").exists()
    text = (elsewhere / "tables.md").read_text()
    assert text.split("\n\nparam")[0].count("one block") > 2

    write_suite(folder, {**content, "seeds": [1, 2]})
    main([*study_arguments(folder), *there, "--report-only"])
    assert not (elsewhere / "near").exists()
    assert (elsewhere / "tables.md").read_text().count("0 of 1") == 2
    with pytest.raises(SystemExit, match="none.jsonl' has no finished run of the suite to report"):
        main([*study_arguments(folder), "--results", str(folder / "none.jsonl"), "--report-only"])
    write_suite(folder, content)


@pytest.mark.parametrize("name", ["lamps"])
def test_the_docs_show_what_the_runs_left(name: str) -> None:
    folder = PROJECT / "docs" / "results"
    text = (PROJECT / "docs" / "results.md").read_text()
    report = json.loads((folder / f"{name}.report.json").read_text())
    results = read_results(str(folder / f"{name}.jsonl"), KEYS)
    suite = read_suite(str(PROJECT / "configs" / "ablation" / f"{name}.yaml"))
    # Those that are there are of today's configuration.
    missing_runs(suite, results, report["reach"])
    rows = [
        line
        for line in tables(report, results_of(suite, results)).splitlines()
        if line.startswith("|")
    ]
    assert len(rows) > 10
    shown = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert [row for row in rows if cells(row) not in shown] == []
