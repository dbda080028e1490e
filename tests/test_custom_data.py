"""Custom datasets: their validation, and real runs of tools/train_net.py on them.

Mutations tried by hand; each makes at least one test here fail: the EXIF rotation ignored.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import detectron2.utils.comm as comm
import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.data.detection_utils import read_image
from PIL import Image
from pycocotools.mask import encode
from tool_process import run_tool, servers, wait

from nonlocal_det.config import load_config
from nonlocal_det.data.coco_validation import image_size, validate_coco
from nonlocal_det.data.dataset_report import compare_splits
from nonlocal_det.data.issue_types import ISSUE_TYPES
from nonlocal_det.data.lamps.writer import annotation_file, image_root, write_dataset
from nonlocal_det.data.masks import decompress_counts, is_rle
from nonlocal_det.engine import nonlocal_argument_parser
from nonlocal_det.engine.custom_data import CustomDatasets, flip_map, load_custom_datasets
from nonlocal_det.engine.trained_classes import CLASSES, check_all_classes

PROJECT = Path(__file__).parents[1]
LAMPS = PROJECT / "configs" / "lamps_mask_rcnn_R18_NL.yaml"
SMALL = [
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0001"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "10", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "160"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),  # so that something is detected
]
NAMES = {3: "lemon", 17: "sea", 40: "plum"}


def train_net(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_tool("train_net", *arguments)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename_classes(content: dict) -> None:
    """Other names, ids with gaps and out of order, nested folders, and no area or iscrowd."""
    ids = dict(zip((1, 2, 3), NAMES))
    content["categories"] = [{"id": i, "name": NAMES[i]} for i in reversed(NAMES)]
    for image in content["images"]:
        image["file_name"] = f"day{image['id'] % 2}/{image['file_name']}"
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
        del annotation["area"], annotation["iscrowd"]


def five_keypoints(content: dict) -> None:
    names = ["nose", "left_ear", "right_ear", "left_hip", "right_hip"]
    content["categories"] = [{"id": 5, "name": "shape", "keypoints": names}]
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        corners = [(0.5, 0.1), (0.1, 0.2), (0.9, 0.2), (0.2, 0.9), (0.8, 0.9)]
        points = [(x + u * width, y + v * height, 2) for u, v in corners]
        annotation["keypoints"] = [float(number) for point in points for number in point]
        annotation["category_id"] = 5


@pytest.fixture()
def custom(tmp_path: Path) -> Path:
    """A folder with train.json and val.json, and their images in train/ and val/."""
    for split, count in (("train", 6), ("val", 4)):
        write_dataset(str(tmp_path), split, count)
        Path(annotation_file(str(tmp_path), split)).rename(tmp_path / f"{split}.json")
        for image in sorted(Path(image_root(str(tmp_path), split)).iterdir()):
            day = image.parent / f"day{int(image.stem) % 2}"
            day.mkdir(exist_ok=True)
            image.rename(day / image.name)
        edit(tmp_path / f"{split}.json", rename_classes)
    return tmp_path


def files(custom: Path, *splits: str) -> list[object]:
    flags = [
        (f"--{s}-json", custom / f"{s}.json", f"--{s}-images", custom / s)
        for s in splits or ("train", "val")
    ]
    return [argument for given in flags for argument in given]


def issues_of(report) -> dict[str, int]:
    return {issue.type: issue.count for issue in report.issues}


@pytest.mark.slow
def test_training_and_evaluating_on_custom_datasets(custom: Path) -> None:
    def damage(content: dict) -> None:
        content["annotations"][0]["bbox"][2] = 0
        content["images"][5]["file_name"] = "gone.png"

    edit(custom / "train.json", damage)
    output = custom / "output"
    done = train_net("--config-file", LAMPS, *files(custom), *SMALL, "OUTPUT_DIR", output)
    assert "boxes without positive width and height" in done.stdout and "gone.png" in done.stdout
    # Removed entries are not trained on, and the user's file is unchanged.
    used = json.loads((output / "datasets" / "custom_train.json").read_text())
    given = json.loads((custom / "train.json").read_text())
    lost = {a["id"] for a in given["annotations"] if a["image_id"] == 6} | {1}
    assert {a["id"] for a in given["annotations"]} - {a["id"] for a in used["annotations"]} == lost
    assert len(used["images"]) == 5 and "Loaded 5 images" in done.stdout
    # Three classes, by ascending id.
    saved = torch.load(output / "model_final.pth", weights_only=True)
    assert saved["classes"] == {"thing_classes": ["lemon", "sea", "plum"]}
    weights = saved["model"]
    assert weights["roi_heads.box_predictor.cls_score.weight"].shape[0] == 3 + 1
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert {"bbox/AP-lemon", "bbox/AP-sea", "bbox/AP-plum", "segm/AP"} <= rows[-1].keys()
    results = json.loads((output / "inference" / "coco_instances_results.json").read_text())
    assert results and {result["category_id"] for result in results} <= set(NAMES)

    again = ("MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", custom / "again")
    train_net("--config-file", LAMPS, "--eval-only", *files(custom, "val"), *SMALL, *again)
    name = Path("inference") / "coco_instances_results.json"
    assert json.loads((custom / "again" / name).read_text()) == results

    # The same categories by other numbers, then others: the checkpoint knows those of training.
    edit(custom / "val.json", reverse_order)
    again = (*again[:-1], custom / "reversed")
    done = train_net("--config-file", LAMPS, "--eval-only", *files(custom, "val"), *SMALL, *again)
    assert "numbered in another order" in done.stdout
    for table in ("custom_val_bbox_per_class.csv", "custom_val_segm_per_class.csv"):
        found, before = (
            (custom / run / "inference" / table).read_text() for run in ("reversed", "again")
        )
        assert found == before


def reverse_order(content: dict) -> None:
    """Number the same categories in another order."""
    ids = dict(zip(NAMES, reversed(NAMES)))
    for category in content["categories"]:
        category["id"] = ids[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]


@pytest.mark.slow
def test_keypoints_come_from_the_file(custom: Path) -> None:
    for split in ("train", "val"):
        edit(custom / f"{split}.json", five_keypoints)
    head = ("MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[8]")
    options = (*SMALL, *head, "MODEL.MASK_ON", "False", "OUTPUT_DIR", custom / "output")
    done = train_net("--config-file", LAMPS, *files(custom), *options)
    assert "TEST.KEYPOINT_OKS_SIGMAS [0.067, 0.067, 0.067, 0.067, 0.067]" in done.stdout
    weights = torch.load(custom / "output" / "model_final.pth", weights_only=True)["model"]
    assert weights["roi_heads.keypoint_head.score_lowres.weight"].shape[1] == 5
    row = json.loads((custom / "output" / "metrics.json").read_text().splitlines()[-1])
    assert "keypoints/AP" in row


@pytest.mark.slow
def test_without_masks_boxes_are_learned(custom: Path) -> None:
    for split in ("train", "val"):
        edit(custom / f"{split}.json", lambda c: [a.pop("segmentation") for a in c["annotations"]])
    done = train_net(
        "--config-file", LAMPS, *files(custom), *SMALL, "OUTPUT_DIR", custom / "output"
    )
    assert "MODEL.MASK_ON False" in done.stdout
    row = json.loads((custom / "output" / "metrics.json").read_text().splitlines()[-1])
    assert "bbox/AP" in row and "segm/AP" not in row


@pytest.mark.slow
def test_check_data_writes_nothing(custom: Path) -> None:
    before = sorted(custom.rglob("*"))
    output = ("OUTPUT_DIR", custom / "output")
    done = train_net("--check-data", "--config-file", LAMPS, *files(custom), *output)
    assert "6 images" in done.stdout and "3 classes (lemon, sea, plum)" in done.stdout
    assert done.stdout.endswith("The data can be used.\n")
    assert sorted(custom.rglob("*")) == before


def test_a_valid_dataset_has_no_issues(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "train", 8)
    report = validate_coco(
        annotation_file(str(tmp_path), "train"), image_root(str(tmp_path), "train")
    )
    assert not report.issues and not report.is_modified
    assert len(report.dataset["images"]) == 8 and report.classes == ["amber", "teal", "violet"]


def test_everything_wrong_is_reported_at_once(custom: Path) -> None:
    def damage(content: dict) -> None:
        first, second, third, fourth, *_ = content["annotations"]
        first["bbox"] = [0, 0, -5, 5]
        first["segmentation"] = [[1, 2, 3, 4, 5]]  # both of one annotation
        second["category_id"] = 99
        third["image_id"] = 1000
        fourth["bbox"][0] = float("nan")
        content["images"][0]["width"] += 1
        content["images"].append(dict(content["images"][1]))

    edit(custom / "train.json", damage)
    counts = issues_of(validate_coco(str(custom / "train.json"), str(custom / "train")))
    assert counts.items() >= {
        ("empty_box", 1),
        ("bad_polygon", 1),
        ("undeclared_category", 1),
        ("no_such_image", 1),
        ("bad_box", 1),
        ("other_size", 1),
        ("same_image_id", 1),
        ("same_file", 1),
    }


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_names_can_be_printed(encoding: str, custom: Path) -> None:
    """Half of a pair of surrogates is valid in JSON."""

    def rename(content: dict) -> None:
        content["categories"][0]["name"] = "\u8def\ud800"
        content["images"][0]["file_name"] = "\u706f\ud800.png"

    edit(custom / "train.json", rename)
    arguments = ("--check-data", "--config-file", LAMPS, *files(custom, "train"))
    done = run_tool("train_net", *arguments, env={"PYTHONIOENCODING": encoding})
    assert done.stdout.count("\\ud800") >= 2


def test_an_invalid_polygon_leaves_the_others(custom: Path) -> None:
    def damage(content: dict) -> None:
        content["annotations"][0]["segmentation"].append([1, 2, 3, 4])

    edit(custom / "train.json", damage)
    report = validate_coco(str(custom / "train.json"), str(custom / "train"))
    assert issues_of(report)["bad_polygon"] == 1
    assert [len(report.dataset["annotations"][0]["segmentation"]), report.is_modified] == [1, True]


def class_names(content: dict) -> list[str]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    return [names[annotation["category_id"]] for annotation in content["annotations"]]


def checkpoint(folder: Path, **classes: list[str]) -> Path:
    path = folder / "model.pth"
    torch.save({"model": {}, CLASSES: classes}, path)
    return path


def loaded(*arguments: object) -> CustomDatasets:
    given = ["--config-file", str(LAMPS), *map(str, arguments)]
    args = nonlocal_argument_parser().parse_args(given)
    return load_custom_datasets(load_config(args.config_file, args.opts), args)


def test_categories_in_another_order_are_renumbered(custom: Path) -> None:
    edit(custom / "val.json", reverse_order)
    given = json.loads((custom / "val.json").read_text())
    weights = checkpoint(custom, thing_classes=["lemon", "sea", "plum"])
    of_run = loaded(*files(custom)).reports["custom_val"]
    evaluated = loaded(*files(custom, "val"), "--eval-only", "MODEL.WEIGHTS", weights)
    for report in (of_run, evaluated.reports["custom_val"]):
        assert report.classes == ["lemon", "sea", "plum"] and report.is_modified
        assert {category["id"] for category in report.dataset["categories"]} == set(NAMES)
        assert class_names(report.dataset) == class_names(given)
    assert evaluated.sources["custom_val"].metadata["thing_classes"] == report.classes
    unknown = loaded(*files(custom, "val"), "--eval-only", "MODEL.WEIGHTS", "elsewhere.pth")
    assert unknown.reports["custom_val"].classes == ["plum", "sea", "lemon"]


def test_resuming_and_evaluating_keep_the_classes(custom: Path, capsys) -> None:
    weights = checkpoint(custom, thing_classes=["lemon", "sea", "pear"])
    (custom / "last_checkpoint").write_text(weights.name)
    resumed = (*files(custom), "--resume", "OUTPUT_DIR", custom)
    for run in (resumed, (*files(custom), "--eval-only", "MODEL.WEIGHTS", weights)):
        before = sorted(custom.rglob("*"))
        with pytest.raises(ValueError, match="The dataset has errors"):
            loaded(*run)
        assert "only the checkpoint has pear" in capsys.readouterr().out
        assert sorted(custom.rglob("*")) == before
    assert loaded(*files(custom), "OUTPUT_DIR", custom).sources  # a new run has its own


def test_resuming_on_another_registered_dataset_is_refused(custom: Path) -> None:
    checkpoint(custom, thing_classes=["lemon", "sea", "plum"])
    (custom / "last_checkpoint").write_text("model.pth")
    cfg = load_config(str(LAMPS), ["OUTPUT_DIR", str(custom)])
    check_all_classes(cfg, eval_only=False, resume=False)
    check_all_classes(cfg, eval_only=True, resume=True)  # of other names, but as many
    with pytest.raises(ValueError, match="train on lemon, sea, plum, but.*'lamps_train' has amber"):
        check_all_classes(cfg, eval_only=False, resume=True)


def test_keypoints_of_another_order_are_an_error(custom: Path) -> None:
    edit(custom / "val.json", five_keypoints)
    names = ["nose", "right_ear", "left_ear", "left_hip", "right_hip"]
    weights = checkpoint(custom, thing_classes=["shape"], keypoint_names=names)
    with pytest.raises(ValueError, match="The dataset has errors"):
        keypoints = ("MODEL.WEIGHTS", weights, "MODEL.KEYPOINT_ON", "True")
        loaded(*files(custom, "val"), "--eval-only", *keypoints)


def test_a_validation_set_without_masks_is_said_to_be_evaluated_for_boxes(custom: Path) -> None:
    edit(custom / "val.json", lambda c: [a.pop("segmentation") for a in c["annotations"]])
    datasets = loaded(*files(custom))
    assert issues_of(datasets.reports["custom_val"])["only_boxes"] == 1
    assert "MODEL.MASK_ON" not in datasets.overrides


def validate_in(rank: int, folder: Path, runs: list[list[str]]) -> None:
    """Load the datasets of runs in one of two processes of a machine, and note what comes of it."""
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(2)
    noted: list[object] = []
    for arguments in runs:
        try:
            datasets = loaded(*arguments)
            noted.append([list(datasets.reports), list(datasets.sources), datasets.overrides])
        except ValueError as error:
            noted.append(str(error))
    (folder / f"rank{rank}.json").write_text(json.dumps(noted))


@pytest.mark.slow
def test_one_process_of_a_machine_validates_for_all(custom: Path, tmp_path: Path) -> None:
    damaged = custom / "damaged.json"
    damaged.write_text("{}")
    runs = [files(custom), ["--train-json", damaged]]
    processes = [servers.Process(target=validate_in, args=(k, tmp_path, runs)) for k in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        wait(process)
    (first, error), (second, same) = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)
    )
    names = ["custom_train", "custom_val"]
    overrides = {"MODEL.ROI_HEADS.NUM_CLASSES": 3, "MODEL.RETINANET.NUM_CLASSES": 3}
    assert first == [names, names, overrides] and second == [[], names, overrides]
    assert "dataset has errors" in error and same == error


def test_sets_are_compared(custom: Path) -> None:
    train, val = (
        validate_coco(str(custom / f"{s}.json"), str(custom / s)) for s in ("train", "val")
    )
    compare_splits(train, val)
    assert "shared_image" not in issues_of(val)  # of the same names, in another folder
    compare_splits(train, train)
    assert issues_of(train)["shared_image"] == 6
    edit(custom / "val.json", lambda content: content["categories"].pop())
    val = validate_coco(str(custom / "val.json"), str(custom / "val"))
    compare_splits(train, val)
    assert val.has_errors and "only the training set has lemon" in str(val)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_sizes_are_those_that_detectron2_reads(tmp_path: Path, orientation: int, kind: str) -> None:
    """The orientation is part of EXIF or of XMP data."""
    image = Image.new("RGB", (60, 40))
    exif = image.getexif()
    exif[0x0112] = orientation
    xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    for name, data in (("exif", {"exif": exif}), ("xmp", {"xmp": xmp})):
        if kind in ("jpg", "webp") or name == "exif":
            image.save(tmp_path / f"{name}.{kind}", **data)
            height, width, _ = read_image(tmp_path / f"{name}.{kind}", "BGR").shape
            assert image_size(str(tmp_path / f"{name}.{kind}")) == (width, height)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 90), (700, 900)])
def test_compressed_counts_are_those_of_coco(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.5, 1):
        mask = np.asfortranarray(rng.random(shape) < share, dtype=np.uint8)
        text = encode(mask)["counts"].decode()
        flat = mask.flatten("F")
        runs = np.diff(np.flatnonzero(np.diff(flat, prepend=1 - flat[0], append=1 - flat[-1])))
        assert decompress_counts(text).tolist() == [*([0] if flat[0] else []), *runs]
        assert is_rle({"size": list(shape), "counts": text}, None)
        assert not is_rle({"size": [shape[0], shape[1] + 1], "counts": text}, None)


def test_left_and_right_keypoints_are_swapped() -> None:
    names = ["nose", "left_eye", "right_eye", "Left-Ear", "Right-Ear", "left_wing"]
    assert flip_map(names) == [("left_eye", "right_eye"), ("Left-Ear", "Right-Ear")]


def test_the_manual_lists_every_issue_type() -> None:
    """docs/custom_datasets.md gives each issue type with its severity."""
    manual = (PROJECT / "docs" / "custom_datasets.md").read_text()
    rows = set(re.findall(r"^\| (.+?) \| (.+?) \|", manual, flags=re.MULTILINE))
    assert {(issue.message, issue.severity) for issue in ISSUE_TYPES.values()} <= rows
