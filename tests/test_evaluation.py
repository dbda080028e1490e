"""COCO metrics: faster-coco-eval's are pycocotools', and the files hold them.

Detections are made from the objects of real COCO images and of lamps: shifted, missed, doubled,
of another class, and with tied scores.

Mutations tried by hand; each makes at least one test here fail: one IoU, or the classes without
objects, left out of the fast evaluation; crowds counted as objects; AP50's column at .75; a figure
without its first class.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_training import DATASET, Workspace

from nonlocal_det import add_nonlocal_config
from nonlocal_det.data import LampsParams, write_dataset
from nonlocal_det.engine import Trainer
from nonlocal_det.evaluation import ReportingCOCOEvaluator, coco_eval_backend
from nonlocal_det.evaluation.evaluators import check_evaluator
from nonlocal_det.evaluation.per_class import per_class_results
from nonlocal_det.evaluation.precision_recall import precision_recall_figure

REAL = Path(__file__).parents[2] / "shared" / "data" / "coco" / "annotations"
TASKS = ("bbox", "segm", "keypoints")


def quietly(function, *arguments, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments, **options)


def made_detections(truth, task, seed=0):
    """In COCO's format, for its ``truth``."""
    rng = np.random.default_rng(seed)
    classes = truth.getCatIds()
    detections = []
    for one in truth.loadAnns(truth.getAnnIds()):
        for _ in range(rng.choice(3, p=[0.2, 0.6, 0.2])):
            shift = rng.normal(scale=0.1, size=2) * one["bbox"][2:]
            found = {
                "image_id": one["image_id"],
                "category_id": int(rng.choice(classes))
                if rng.random() < 0.1
                else one["category_id"],
                "score": round(float(rng.random()), 1),
            }
            if task == "bbox":
                stretch = one["bbox"][2:] * rng.uniform(0.8, 1.2, 2)
                found["bbox"] = [*(one["bbox"][:2] + shift), *stretch]
            elif task == "segm":
                moved = np.roll(truth.annToMask(one), shift.astype(int), axis=(1, 0))
                found["segmentation"] = rle.encode(np.asfortranarray(moved))
            elif one["num_keypoints"]:
                points = np.array(one["keypoints"], dtype=float).reshape(-1, 3)
                spread = 0.3 * rng.random() * np.sqrt(one["area"]) / 3
                points[:, :2] += rng.normal(scale=spread, size=(len(points), 2))
                found["keypoints"] = points.flatten().tolist()
            else:
                continue
            detections.append(found)
    return detections


def measured(kind, truth, detections, task):
    truth = copy.deepcopy(truth)  # an evaluation changes it
    evaluation = kind(truth, quietly(truth.loadRes, copy.deepcopy(detections)), task)
    quietly(evaluation.evaluate)
    quietly(evaluation.accumulate)
    quietly(evaluation.summarize)
    return evaluation


def assert_equal_metrics(truth, task, detections):
    official = measured(COCOeval, truth, detections, task)
    quick = measured(coco_eval_backend.FastCOCOeval, truth, detections, task)
    assert len(quick.stats) == len(official.stats) == (10 if task == "keypoints" else 12)
    # Precisions differ in the last bit: pycocotools adds one to each denominator.
    assert quick.stats == pytest.approx(official.stats, rel=0, abs=1e-15)
    for key in ("precision", "recall", "scores"):
        assert np.allclose(quick.eval[key], official.eval[key], rtol=0, atol=1e-15), key
    assert 0.05 < official.stats[0] < 0.95
    return official


@pytest.fixture(scope="module")
def lamps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lamps")
    params = LampsParams(side=(48, 80), num_shapes=(1, 3), shape_size=(12, 30), lamp_size=(8, 10))
    write_dataset(str(folder), "val", 40, params=params)
    file = folder / "annotations" / "instances_val.json"
    register_coco_instances("evaluated_lamps", {}, str(file), str(folder / "val"))
    DatasetCatalog.get("evaluated_lamps")  # fills the metadata
    yield quietly(COCO, str(file))
    DatasetCatalog.remove("evaluated_lamps")
    MetadataCatalog.remove("evaluated_lamps")


@pytest.mark.skipif(not REAL.exists(), reason="needs some COCO 2017 in ../shared/data/coco")
@pytest.mark.parametrize("task", TASKS)
def test_fast_metrics_are_pycocotools_on_real_coco(task):
    start = "person_keypoints" if task == "keypoints" else "instances"
    truth = quietly(COCO, str(REAL / f"{start}_val2017.json"))
    assert any(one["iscrowd"] for one in truth.anns.values())
    assert_equal_metrics(truth, task, made_detections(truth, task))


@pytest.mark.parametrize("task", ("bbox", "segm"))
def test_fast_metrics_are_pycocotools_on_lamps(lamps, task):
    assert_equal_metrics(lamps, task, made_detections(lamps, task))


def evaluated(lamps, detections, folder, **options):
    """The evaluator's results on made detections, and the COCOeval class that it used."""
    kinds = []

    class Evaluator(ReportingCOCOEvaluator):
        def _derive_coco_results(self, coco_eval, *rest, **more):
            kinds.append(type(coco_eval))
            return super()._derive_coco_results(coco_eval, *rest, **more)

    evaluator = Evaluator("evaluated_lamps", distributed=False, output_dir=str(folder), **options)
    detections = copy.deepcopy(detections)
    for one in detections:
        one["category_id"] -= 1  # as a model gives them, from 0
        if "segmentation" in one:
            one["segmentation"]["counts"] = one["segmentation"]["counts"].decode()
    evaluator._predictions = [{"image_id": 1, "instances": detections}]
    return quietly(evaluator.evaluate), kinds


def rows_of(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_evaluator_is_quick_and_gives_detectron2s_results(lamps, tmp_path):
    detections = made_detections(lamps, "segm")
    quick, kinds = evaluated(lamps, detections, tmp_path / "quick")
    own = getattr(coco_evaluation, "COCOeval_opt", COCOeval)
    assert kinds == [coco_eval_backend.FastCOCOeval if own is COCOeval else own] * 2
    assert coco_evaluation.COCOeval is COCOeval  # again
    official, kinds = evaluated(lamps, detections, tmp_path / "own", use_fast_impl=False)
    assert kinds == [COCOeval] * 2
    assert quick.keys() == official.keys() == {"bbox", "segm"}
    for task in quick:
        assert quick[task] == pytest.approx(official[task], rel=0, abs=1e-12, nan_ok=True)
        rows = rows_of(tmp_path / "quick" / f"evaluated_lamps_{task}_per_class.csv")
        assert rows == rows_of(tmp_path / "own" / f"evaluated_lamps_{task}_per_class.csv")
        for row in rows:
            assert float(row["AP"]) == pytest.approx(official[task][f"AP-{row['class']}"], abs=1e-3)
        mean = np.mean([float(row["AP50"]) for row in rows])
        assert mean == pytest.approx(official[task]["AP50"], abs=1e-3)
        figure = tmp_path / "quick" / f"evaluated_lamps_{task}_precision_recall.png"
        assert figure.read_bytes().startswith(b"\x89PNG")


IDS = {
    "as they are": {},
    "negative": {"annotation": lambda k: -k},
    "0, and beyond 2^53": {
        "annotation": lambda k: k - 1,
        "image": lambda k: k + 1537218342345678901,
    },
    "beyond 2^64": {"annotation": lambda k: k + 2**70, "category": lambda k: k - 2**60},
}


@pytest.fixture()
def register(lamps, tmp_path):
    """A function that registers a copy of the dataset with a slash in its name."""
    names = []

    def add(change):
        content = copy.deepcopy(lamps.dataset)
        change(content)
        file = tmp_path / "changed.json"
        file.write_text(json.dumps(content))
        names.append(f"other/{len(names)}")
        register_coco_instances(names[-1], {}, str(file), "")
        return names[-1], DatasetCatalog.get(names[-1])

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def metrics_of_found(name, records, folder=None):
    """The evaluator's metrics if a model finds all objects but every fifth, with their masks."""
    evaluator = ReportingCOCOEvaluator(name, distributed=False, output_dir=folder)
    evaluator.reset()
    for record in records:
        found = [one for k, one in enumerate(record["annotations"]) if (record["place"] + k) % 5]
        instances = [
            {
                **{"image_id": record["image_id"], "category_id": one["category_id"]},
                **{"bbox": one["bbox"], "score": 0.9, "segmentation": one["mask"]},
            }
            for one in found
        ]
        evaluator._predictions.append({"image_id": record["image_id"], "instances": instances})
    return quietly(evaluator.evaluate)


def with_masks(records, truth):
    """Records with the masks of the objects, whatever a changed file says of them."""
    for place, (record, objects) in enumerate(zip(records, truth.imgToAnns.values())):
        record["place"] = place
        for one, annotation in zip(record["annotations"], objects):
            mask = truth.annToRLE(annotation)
            one["mask"] = {**mask, "counts": mask["counts"].decode()}
    return records


def test_any_ids_give_the_same_metrics(lamps, register):
    """The implementations have limits: 0, negative numbers, integers that no float is."""
    results = {}
    for case, ids in IDS.items():

        def change(content, ids=ids):
            for part, keys in (
                ("images", {"id": "image"}),
                ("categories", {"id": "category"}),
                (
                    "annotations",
                    {"id": "annotation", "image_id": "image", "category_id": "category"},
                ),
            ):
                for one in content[part]:
                    for key, kind in keys.items():
                        one[key] = ids.get(kind, int)(one[key])

        name, records = register(change)
        results[case] = metrics_of_found(name, with_masks(records, lamps))
    plain = results.pop("as they are")
    assert 60 < plain["bbox"]["AP"] < 95 and 60 < plain["segm"]["AP"] < 95
    for case, result in results.items():
        for task in ("bbox", "segm"):
            assert result[task] == pytest.approx(plain[task], abs=1e-9, nan_ok=True), case


@pytest.mark.parametrize("count", (1, None), ids=("an annotation", "all annotations"))
def test_masks_are_evaluated_if_all_are_annotated(count, lamps, register):
    name, records = register(
        lambda content: [one.pop("segmentation") for one in content["annotations"][:count]]
    )
    result = metrics_of_found(name, with_masks(records, lamps))
    assert result.keys() == {"bbox"} and result["bbox"]["AP"] > 60


@pytest.mark.parametrize("blocked", (False, True), ids=("drawn", "not to be drawn"))
def test_no_name_and_no_figure_ends_an_evaluation(blocked, lamps, register, tmp_path):
    def change(content):
        for category, name in zip(content["categories"], ("$5 or 5$", "a$\\frac$", "_c")):
            category["name"] = name

    name, records = register(change)
    figure = tmp_path / "other_0_bbox_precision_recall.png"
    if blocked:
        figure.mkdir()
    result = metrics_of_found(name, with_masks(records, lamps), str(tmp_path))
    assert result["bbox"]["AP"] > 60
    assert figure.is_file() != blocked
    rows = rows_of(tmp_path / "other_0_bbox_per_class.csv")
    assert [row["class"] for row in rows] == ["$5 or 5$", "a$\\frac$", "_c"]


def test_without_the_fast_package_pycocotools_measures(lamps, tmp_path, monkeypatch):
    monkeypatch.setattr(coco_eval_backend, "COCOeval_faster", None)
    kinds = evaluated(lamps, made_detections(lamps, "segm"), tmp_path)[1]
    assert kinds == [getattr(coco_evaluation, "COCOeval_opt", COCOeval)] * 2


def test_without_detections_no_older_files_remain(lamps, tmp_path):
    evaluated(lamps, made_detections(lamps, "segm"), tmp_path)
    evaluated(lamps, [], tmp_path)
    assert not list(tmp_path.glob("*bbox_*"))


@pytest.fixture()
def by_hand():
    """Class 1: two objects and a crowd; class 2: none. Class 3: one, with keypoints or without."""
    boxes = {1: [0, 0, 10, 10], 2: [20, 0, 10, 10], 3: [40, 0, 50, 50], 4: [0, 60, 10, 10]}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": k, "name": name} for k, name in ((1, "a"), (2, "b"), (3, "c"))],
        "annotations": [
            {
                **{"id": k, "image_id": 1, "category_id": 3 if k == 4 else 1, "bbox": box},
                **{"area": box[2] * box[3], "iscrowd": int(k == 3)},
                **{"keypoints": [1, 1, 2] * 17, "num_keypoints": 0 if k == 2 else 17},
            }
            for k, box in boxes.items()
        ],
    }
    quietly(truth.createIndex)
    return truth


@pytest.mark.parametrize("kind", (COCOeval, coco_eval_backend.FastCOCOeval))
def test_table_by_hand(by_hand, kind):
    # Object 1 is detected exactly, object 2 not, 4 with an IoU of 0.6: at .50, .55 and .60.
    found = [(1, [0, 0, 10, 10]), (3, [0, 60, 10, 6])]
    detections = [{"image_id": 1, "category_id": k, "bbox": box, "score": 0.9} for k, box in found]
    table = per_class_results(measured(kind, by_hand, detections, "bbox"))
    # COCO reads precision at recalls 0, .01, ... 1: 51 of 101 are not above one half.
    half = 100 * 51 / 101
    nan = float("nan")
    assert table[0][:2] == ("a", 2) and table[0][2:] == pytest.approx((half, half, half, 50))
    assert table[1][:2] == ("b", 0) and table[1][2:] == pytest.approx([nan] * 4, nan_ok=True)
    assert table[2][:2] == ("c", 1) and table[2][2:] == pytest.approx((30, 100, 0, 30))


@pytest.mark.parametrize("kind", (COCOeval, coco_eval_backend.FastCOCOeval))
def test_table_of_keypoints_counts_objects_that_have_some(by_hand, kind):
    detections = [{"image_id": 1, "category_id": 1, "keypoints": [1, 1, 2] * 17, "score": 0.9}]
    table = per_class_results(measured(kind, by_hand, detections, "keypoints"))
    assert [row.num_objects for row in table] == [1, 0, 1]
    assert table[0].ap == pytest.approx(100)


@pytest.mark.parametrize("count", (1, 3, 80))
def test_curves_show_the_evaluation(count):
    rng = np.random.default_rng(0)
    params = SimpleNamespace(
        iouThrs=np.linspace(0.5, 0.95, 10), recThrs=np.linspace(0, 1, 101), iouType="bbox"
    )
    precision = -np.sort(-rng.random((10, 101, count)), axis=1)
    empty = -np.ones((10, 101, 1))  # a class without objects is not plotted
    names = [f"class {k}" for k in range(count)]
    figure = precision_recall_figure(
        [*names, "empty"], np.concatenate([precision, empty], axis=2), params
    )
    expected = (precision[0], precision[5], precision.mean(axis=0))
    for axis, curves in zip(figure.axes, expected):
        plotted = {tuple(np.round(line.get_ydata(), 9)) for line in axis.lines}
        wanted = [*curves.T, *([curves.mean(axis=1)] if count > 1 else [])]
        assert plotted == {tuple(np.round(curve, 9)) for curve in wanted}
        assert axis.get_title().endswith(f"AP {100 * curves.mean():.1f}")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == {1: 1, 3: 4, 80: 10}[count]


@pytest.fixture()
def cfg(tmp_path):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


def test_trainer_evaluates_by_it(lamps, cfg):
    assert isinstance(Trainer.build_evaluator(cfg, "evaluated_lamps"), ReportingCOCOEvaluator)


@pytest.fixture()
def voc(lamps, tmp_path):
    """The records of that dataset, registered in the format of Pascal VOC."""
    names = [category["name"] for category in lamps.loadCats(lamps.getCatIds())]
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for image in lamps.imgs.values():
        objects = "".join(_voc_object(one, names) for one in lamps.imgToAnns[image["id"]])
        size = f"<size><height>{image['height']}</height><width>{image['width']}</width></size>"
        text = f"<annotation>{size}{objects}</annotation>"
        (tmp_path / "Annotations" / f"{image['id']}.xml").write_text(text)
    lines = "\n".join(map(str, lamps.imgs))
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text(lines)
    register_pascal_voc("evaluated_voc", str(tmp_path), "test", 2012, names)
    MetadataCatalog.get("evaluated_voc").evaluator_type = "pascal_voc"
    yield DatasetCatalog.get("evaluated_voc")
    DatasetCatalog.remove("evaluated_voc")
    MetadataCatalog.remove("evaluated_voc")


def _voc_object(annotation, names):
    x, y, width, height = annotation["bbox"]
    sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
    box = "".join(f"<{side}>{round(value)}</{side}>" for side, value in sides.items())
    details = "<pose>none</pose><truncated>0</truncated><difficult>0</difficult>"
    name = names[annotation["category_id"] - 1]
    return f"<object><name>{name}</name>{details}<bndbox>{box}</bndbox></object>"


def test_trainer_evaluates_pascal_voc(voc, cfg):
    evaluator = Trainer.build_evaluator(cfg, "evaluated_voc")
    evaluator.reset()
    for record in voc:
        found = record["annotations"]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes([one["bbox"] for one in found])
        instances.pred_classes = torch.tensor([one["category_id"] for one in found])
        instances.scores = torch.ones(len(found))
        evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_what_cannot_be_evaluated_is_said_at_once(voc):
    check_evaluator("evaluated_voc", "RetinaNet")
    check_evaluator("evaluated_voc", "an architecture of the user's own")
    with pytest.raises(ValueError, match="evaluated_voc.*by instances.*predicts sem_seg only"):
        check_evaluator("evaluated_voc", "SemanticSegmentor")
    with pytest.raises(ValueError, match="coco_2014_typo.*None.*pascal_voc, lvis"):
        check_evaluator("coco_2014_typo", "GeneralizedRCNN")


@pytest.mark.parametrize(
    ("dataset", "package"),
    [("lvis_v1_val", "lvis"), ("cityscapes_fine_instance_seg_val", "cityscapesscripts")],
)
def test_an_evaluator_s_package_is_asked_for(dataset, package):
    if find_spec(package):
        check_evaluator(dataset, "GeneralizedRCNN")
        return
    with pytest.raises(ValueError, match=f"(?i){dataset}.*pip install {package}"):
        check_evaluator(dataset, "GeneralizedRCNN")


@pytest.mark.slow
def test_augmentation_evaluates_boxes_and_masks(tmp_path):
    augmented = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(40,56)", "TEST.AUG.FLIP", True)
    workspace = Workspace(tmp_path)
    workspace.train("trained", "SOLVER.MAX_ITER", 1)
    workspace.train(
        "out",
        "--eval-only",
        *("MODEL.WEIGHTS", tmp_path / "trained" / "model_final.pth"),
        *("DATASETS.TEST", f"('{DATASET}',)", "INPUT.MIN_SIZE_TEST", 48),
        *augmented,
    )
    plain, together = (
        json.loads((tmp_path / "out" / folder / "coco_instances_results.json").read_text())
        for folder in ("inference", "inference_TTA")
    )
    assert together and all("segmentation" in one and "bbox" in one for one in together)
    assert {one["image_id"] for one in together} == {one["image_id"] for one in plain}
    assert together != plain
