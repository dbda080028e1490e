"""The table of bad inputs: each exits with a readable one-line error before anything starts.

Every row is tried in a folder that holds an earlier run's output; afterwards all files are as they
were, bit for bit, and no other is there. Rows run in this process, for speed, by the scripts' own
main functions; some run again as processes, for the exit code and the output.

Mutations tried by hand; each makes at least one test here fail: YAML that is not a mapping, a
checkpoint of which nothing fits, no dataset at all, a JSON list of numbers, zero images to measure,
overrides of keys that a LazyConfig does not have, an output checked only after the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Union

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tool_process import run_tool

from nonlocal_det.cli import check_data
from nonlocal_det.config import load_config
from nonlocal_det.data import register_lamps
from nonlocal_det.data.dataset_mapper import CheckedDatasetMapper
from nonlocal_det.data.issue_types import ERROR, ISSUE_TYPES, REMOVED
from nonlocal_det.data.lamps.writer import annotation_file, ensure_dataset
from nonlocal_det.engine import Trainer, nonlocal_argument_parser
from nonlocal_det.engine.custom_data import load_custom_datasets
from nonlocal_det.engine.lazy_trainer import LazyTrainer

PROJECT = Path(__file__).parents[1]
LAMPS = "lamps_mask_rcnn_R18_NL.yaml"
CUSTOM = ["--train-json", "custom.json", "--train-images", "images"]
HERE = {"DETECTRON2_DATASETS": "."}
# Registered datasets, by name, with their metadata.
DATASETS = {
    "segmented": {"evaluator_type": "sem_seg"},
    "unknown": {},
    "boxes": {"evaluator_type": "pascal_voc"},
    "reordered": {"evaluator_type": "coco", "json_file": "reordered.json"},
}
KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.MASK_ON", "False"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lamps dataset, inputs of all kinds, and the files of an earlier run in output/."""
    root = tmp_path_factory.mktemp("bad_input")
    ensure_dataset(str(root / "lamps"), {"train": 4, "val": 2})
    write_files(root)
    return root


@pytest.fixture()
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    shutil.copytree(root, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("nonlocal_det.data.builtin.ensure_dataset", lambda *_, **__: None)
    for name in ("train", "test"):
        for trainer in (Trainer, LazyTrainer):
            monkeypatch.setattr(trainer, name, lambda *_: pytest.fail("it started", pytrace=False))
    register_lamps(".")
    for name, metadata in DATASETS.items():
        monkeypatch.setitem(DatasetCatalog.data, name, list)
        MetadataCatalog.pop(name, None)
        MetadataCatalog.get(name).set(**metadata)
    return tmp_path / "here"


def write_files(root: Path) -> None:
    (root / "output").mkdir()
    for name in ("config.yaml", "log.txt", "model_final.pth", "metrics.json", "last_checkpoint"):
        (root / "output" / name).write_text(f"an earlier run's {name}")
    (root / "output" / "config.yaml").write_text(get_cfg().dump())
    for name, text in {
        "broken.yaml": "MODEL: [1, 2\n  DEVICE: cpu",
        "list.yaml": "- 1\n- 2",
        "text.yaml": "just words",
        "base.yaml": "_BASE_: no_such_base.yaml",
        "key.yaml": f"_BASE_: {PROJECT / 'configs' / LAMPS}\nMODEL:\n  NONLOCAL:\n    SCAEL: True",
        "empty.pth": "",
        "words.pth": "these are no weights",
        "words.pkl": "these are no weights",
        "a_file": "in the way of a folder",
        "no_image.jpg": "no image",
        "broken.py": "model = (",
    }.items():
        (root / name).write_text(text)
    categories = [{"id": i, "name": name} for i, name in enumerate(("violet", "teal", "amber"))]
    (root / "reordered.json").write_text(json.dumps({"categories": categories}))
    (root / "binary.yaml").write_bytes(bytes(range(256)))
    torch.save({"model": {"conv.weight": torch.ones(3, 3)}}, root / "other.pth")
    torch.save(
        {"model": {"roi_heads.box_predictor.cls_score.weight": torch.ones(81, 1024)}},
        root / "shapes.pth",
    )
    torch.save([1, 2, 3], root / "numbers.pth")
    torch.save(torch.nn.Linear(2, 2), root / "module.pth")
    torch.save({"model": {"a": Evil()}}, root / "evil.pth")
    (root / "evil.pkl").write_bytes(pickle.dumps({"model": {"a": Evil()}}))
    stem = {"backbone.bottom_up.stem.conv1.weight": torch.ones(64, 3, 7, 7)}
    torch.save({"model": stem}, root / "backbone.pth")
    whole = (root / "other.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (root / "cut.pkl").write_bytes(pickle.dumps({"model": {"a": [1] * 100}})[:-20])
    Image.new("RGB", (64, 48)).save(root / "good.png")
    shutil.copytree(root / "lamps" / "train", root / "images")
    shutil.copy(annotation_file(str(root / "lamps"), "train"), root / "custom.json")


class Evil:
    """An object that leaves a file when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tool_path(name: str) -> Path:
    path = PROJECT / "tools" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as a script has it
    return path


def train(*options: str, config: str = LAMPS) -> list[str]:
    """Arguments of tools/train_net.py."""
    ours = PROJECT / "configs" / config
    return ["--config-file", str(ours) if ours.exists() else config, *options]


def ends_with(run: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The error that a command line exits with; its exit code is not 0."""
    with pytest.raises(SystemExit) as stop:
        run()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if isinstance(stop.value.code, str):  # printed by the interpreter, which exits with 1
        return stop.value.code
    assert stop.value.code not in (None, 0)
    return error.strip().splitlines()[-1]  # argparse's, below the usage


def run_train_net(arguments: list[str]) -> None:
    runpy.run_path(str(tool_path("train_net")))["main"](arguments)


CONFIGURATIONS = {
    "a missing file": (train(config="no_such.yaml"), ["no_such.yaml"]),
    "no file": (["--config-file", ""], ["configuration file"]),
    "a folder": (train(config="images"), ["images"]),
    "broken YAML": (train(config="broken.yaml"), ["broken.yaml", "line 2"]),
    "a list": (train(config="list.yaml"), ["list.yaml", "keys"]),
    "words": (train(config="text.yaml"), ["text.yaml", "keys"]),
    "binary": (train(config="binary.yaml"), ["binary.yaml"]),
    "a base that is missing": (train(config="base.yaml"), ["no_such_base.yaml"]),
    "an unknown key in a file": (train(config="key.yaml"), ["SCAEL", "MODEL.NONLOCAL.SCALE"]),
    "a lazy configuration": (train(config="broken.py"), ["broken.py", "lazyconfig_train_net.py"]),
    "an unknown key": (
        train("MODEL.NONLOCL.SCALE", "True"),
        ["MODEL.NONLOCL", "MODEL.NONLOCAL"],
    ),
    "a key without a value": (train("MODEL.NONLOCAL.SCALE"), ["MODEL.NONLOCAL.SCALE"]),
    "another type": (train("MODEL.NONLOCAL.SCALE", "often"), ["scale is 'often'", "True"]),
    "KEY=VALUE": (train("SOLVER.MAX_ITER=3"), ["SOLVER.MAX_ITER=3"]),
}
POSITIONS = {
    "an unknown place": (["('res6[0]',)"], ["res6[0]", "res2, res3, res4"]),
    "out of range": (["('res4[7]',)"], ["res4[7]", "2 blocks", "0 to 1"]),
    "no syntax": (["('res4[',)"], ["'res4['", "'res4[-2]'"]),
    "no index": (["('res4',)"], ["'res4'"]),
    "no text": (["(4,)"], ["4"]),
    "a word": (["('res4[x]',)"], ["res4[x]"]),
    "nothing selected": (["('res4[5:]',)"], ["res4[5:]"]),
    "a level that is not there": (["('p7',)"], ["p7"]),
    "a setting that does not exist": (["('res4[0] SPEED=2',)"], ["SPEED"]),
    "a setting's value": (["('res4[0] PAIRWISE=cosine',)"], ["cosine", "dot_product"]),
    "twice": (["('res4[0]', 'res4[:]')"], ["res4[:]", "second block"]),
    "a frozen stage": (
        ["('res2[0]',)", "MODEL.BACKBONE.FREEZE_AT", "2"],
        ["res2[0]", "MODEL.BACKBONE.FREEZE_AT"],
    ),
    "a head that takes none": (
        ["('mask_head[0]',)", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"],
        ["mask_head", "NonLocalMaskRCNN"],
    ),
    "a head that is off": (["('keypoint_head[0]',)"], ["keypoint_head", "KEYPOINT_ON"]),
    "a backbone that takes none": (
        ["('res4[-2]',)", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"],
        ["build_nonlocal_resnet_fpn_backbone"],
    ),
    "a level that nothing reads": (
        ["('p5',)", "MODEL.RPN.IN_FEATURES", "['p2']", "MODEL.ROI_HEADS.IN_FEATURES", "['p2']"],
        ["p5"],
    ),
}
SETTINGS = {
    "mechanism": (["MODEL.NONLOCAL.MECHANISM", "local"], ["local", "global_context"]),
    "pairwise": (["MODEL.NONLOCAL.PAIRWISE", "cosine"], ["cosine", "embedded_gaussian"]),
    "norm": (["MODEL.NONLOCAL.NORM", "FrozenBN"], ["FrozenBN", "'BN'"]),
    "batch norm of a single vector": (
        [
            *("MODEL.NONLOCAL.MECHANISM", "global_context", "MODEL.NONLOCAL.NORM", "BN"),
            *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.ACCUMULATION_STEPS", "2"),
        ],
        ["one vector per image", "MODEL.NONLOCAL.NORM", "'GN'", "res4.nl0"],
    ),
    "unknown norm": (["MODEL.NONLOCAL.NORM", "IN"], ["'IN'", "'BN'"]),
    "reduction": (["MODEL.NONLOCAL.REDUCTION", "0"], ["REDUCTION", "0"]),
    "reduction beyond": (["MODEL.NONLOCAL.REDUCTION", "4096"], ["REDUCTION", "4096"]),
    "init": (["MODEL.NONLOCAL.INIT", "zeros"], ["zeros", "'kaiming'"]),
    "groups": (
        ["MODEL.NONLOCAL.MECHANISM", "compact_generalized", "MODEL.NONLOCAL.GROUPS", "7"],
        ["7"],
    ),
    "kernel": (
        ["MODEL.NONLOCAL.MECHANISM", "compact_generalized", "MODEL.NONLOCAL.KERNEL", "rbf"],
        ["rbf"],
    ),
    "window": (["MODEL.NONLOCAL.MECHANISM", "windowed", "MODEL.NONLOCAL.WINDOW_SIZE", "0"], ["0"]),
    "optimizer": (["SOLVER.OPTIMIZER", "Adam"], ["Adam", "AdamW"]),
    "schedule": (["SOLVER.LR_SCHEDULER_NAME", "Linear"], ["Linear"]),
    "steps": (["SOLVER.STEPS", "(20, 10)"], ["20"]),
    "batch": (["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH"]),
    "iterations": (["SOLVER.MAX_ITER", "-1"], ["SOLVER.MAX_ITER"]),
    "depth": (["MODEL.RESNETS.DEPTH", "51"], ["51"]),
    "architecture": (["MODEL.META_ARCHITECTURE", "MaskRCNN"], ["MaskRCNN"]),
    "a head's name": (["MODEL.ROI_BOX_HEAD.NAME", "BoxHead"], ["BoxHead"]),
    "backbone": (["MODEL.BACKBONE.NAME", "resnet"], ["resnet"]),
    "classes": (["MODEL.ROI_HEADS.NUM_CLASSES", "-3"], ["ROI_HEADS.NUM_CLASSES"]),
    "fewer classes than the dataset": (
        ["MODEL.ROI_HEADS.NUM_CLASSES", "2"],
        ["ROI_HEADS.NUM_CLASSES is 2", "'lamps_train' has 3: amber, teal, violet"],
    ),
    "more classes than the test set": (
        ["--eval-only", "MODEL.ROI_HEADS.NUM_CLASSES", "80"],
        ["ROI_HEADS.NUM_CLASSES is 80", "'lamps_val' has 3"],
    ),
    "classes of RetinaNet": (
        ["MODEL.META_ARCHITECTURE", "RetinaNet"],
        ["MODEL.RETINANET.NUM_CLASSES is 80", "'lamps_train' has 3"],
    ),
    "classes of a test set in another order": (
        ["DATASETS.TEST", "('reordered',)"],
        ["'violet' has index 0", "'reordered'", "2", "amber, teal, violet"],
    ),
    "a dataset without masks": (
        ["DATASETS.TRAIN", "('boxes',)"],
        ["MODEL.MASK_ON is True", "'boxes'", "only boxes"],
    ),
    "a dataset without keypoints": (
        [*KEYPOINTS, "DATASETS.TEST", "()"],
        ["MODEL.KEYPOINT_ON", "'lamps_train'", "keypoint_names and keypoint_flip_map"],
    ),
    "sigmas of other keypoints": (
        ["--eval-only", *KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "5"],
        ["TEST.KEYPOINT_OKS_SIGMAS has 17", "NUM_KEYPOINTS is 5"],
    ),
    "anchors": (["MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]*2"], ["SIZES"]),
    "device": (["MODEL.DEVICE", "gpu"], ["'gpu'", "'cpu'"]),
    "device that torch lacks": (["MODEL.DEVICE", "tpu"], ["'tpu'", "'cpu'"]),
    "device beyond": (["MODEL.DEVICE", "cuda:7"], ["'cuda:7'", "'cpu'"]),
    "dataset": (["DATASETS.TEST", "('lamp_val',)"], ["lamp_val", "lamps_val"]),
    "dataset that nothing is like": (["DATASETS.TRAIN", "('xyz',)"], ["xyz"]),
    "dataset that is not there": (
        ["DATASETS.TRAIN", "('coco_2017_train',)"],
        ["coco_2017_train", "DETECTRON2_DATASETS"],
    ),
    "a directory of a dataset": (
        ["DATASETS.TEST", "('voc_2007_test',)"],
        ["voc_2007_test", "VOC2007", "DETECTRON2_DATASETS"],
    ),
    "a dataset for another model": (
        ["DATASETS.TEST", "('segmented',)"],
        ["segmented", "sem_seg", "GeneralizedRCNN predicts instances"],
    ),
    "a dataset without an evaluator": (
        ["DATASETS.TEST", "('unknown',)"],
        ["unknown", "None", "coco_panoptic_seg, sem_seg, pascal_voc, lvis"],
    ),
    "no dataset": (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN"]),
    "sampler": (["DATALOADER.SAMPLER_TRAIN", "nope"], ["'nope'", "'TrainingSampler'"]),
    "seed": (["SEED", "5000000000000000000000"], ["SEED", "4294967295"]),
    "seed that is no whole number": (["SEED", "5e21"], ["SEED", "int"]),
    "workers": (["DATALOADER.NUM_WORKERS", "-1"], ["DATALOADER.NUM_WORKERS", "at least 0"]),
    "no period": (["SOLVER.CHECKPOINT_PERIOD", "0"], ["SOLVER.CHECKPOINT_PERIOD", "at least 1"]),
    "no size": (["INPUT.MIN_SIZE_TRAIN", "()"], ["INPUT.MIN_SIZE_TRAIN"]),
    "a size": (["INPUT.MIN_SIZE_TRAIN", "(-8,)"], ["INPUT.MIN_SIZE_TRAIN", "-8"]),
    "sampling of sizes": (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], ["INPUT", "two values"]),
    "crop": (
        ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "none"],
        ["INPUT", "AssertionError"],
    ),
    "reference": (["SOLVER.REFERENCE_WORLD_SIZE", "7"], ["SOLVER.REFERENCE_WORLD_SIZE", "7"]),
    "clipping": (
        ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "nope"],
        ["nope"],
    ),
}
WEIGHTS = {
    "missing": ("no_such.pth", ["no_such.pth"]),
    "a folder": ("images", ["images"]),
    "empty": ("empty.pth", ["empty.pth", "cannot be read"]),
    "words": ("words.pth", ["words.pth", "cannot be read"]),
    "cut": ("cut.pth", ["cut.pth", "cannot be read"]),
    "a broken pickle": ("cut.pkl", ["cut.pkl", "cannot be read"]),
    "words as a pickle": ("words.pkl", ["words.pkl", "cannot be read"]),
    "numbers": ("numbers.pth", ["numbers.pth", "cannot be read"]),
    "a whole module": ("module.pth", ["module.pth", "torch.nn.modules.linear.Linear"]),
    "code": ("evil.pth", ["evil.pth", "not loaded", "posix.system"]),
    "code in a pickle": ("evil.pkl", ["evil.pkl", "not loaded", "posix.system"]),
    "of another model": ("other.pth", ["other.pth", "No tensor", "conv.weight", "backbone"]),
    "of other shapes": ("shapes.pth", ["shapes.pth", "No tensor"]),
}
OUTPUTS = {
    "a file": ("a_file", ["OUTPUT_DIR", "a_file"]),
    "below a file": ("a_file/output", ["OUTPUT_DIR", "a_file/output"]),
    "a URL": ("s3://bucket/output", ["OUTPUT_DIR", "s3://bucket/output", "local"]),
    "where nobody can write": ("/proc/output", ["OUTPUT_DIR", "/proc/output"]),
}
TRAIN = {
    **{f"configuration: {name}": row for name, row in CONFIGURATIONS.items()},
    **{
        f"position: {name}": (train("MODEL.NONLOCAL.POSITIONS", *options), said)
        for name, (options, said) in POSITIONS.items()
    },
    **{f"setting: {name}": (train(*options), said) for name, (options, said) in SETTINGS.items()},
    **{
        f"weights: {name}": (train("MODEL.WEIGHTS", file), said)
        for name, (file, said) in WEIGHTS.items()
    },
    **{
        f"output: {name}": (train("OUTPUT_DIR", file), said)
        for name, (file, said) in OUTPUTS.items()
    },
    "evaluation of what is not in the weights": (
        train("--eval-only", "MODEL.WEIGHTS", "backbone.pth"),
        ["backbone.pth", "135 tensors"],
    ),
    "weights of another model for a frozen norm": (
        train("MODEL.WEIGHTS", "other.pth", "MODEL.RESNETS.NORM", "FrozenBN"),
        ["other.pth", "No tensor"],
    ),
    "evaluation without weights": (train("--eval-only"), ["MODEL.WEIGHTS is empty", "random"]),
    "resuming what is corrupt": (train("--resume"), ["output", "no intact checkpoint"]),
    "images without annotations": (
        train("--train-images", "images"),
        ["--train-images", "--train-json"],
    ),
    "an unknown flag": (["--train-jsn", "custom.json"], ["--train-jsn"]),
    "a flag without its value": (train("--num-gpus"), ["--num-gpus", "OUTPUT_DIR"]),
    "augmented keypoints": (
        train("--eval-only", "TEST.AUG.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"),
        ["TEST.AUG.ENABLED", "MODEL.KEYPOINT_ON", "boxes and masks"],
    ),
    "custom datasets of an earlier run": (
        train("DATASETS.TEST", "('custom_val',)"),
        ["custom_val", "--val-json"],
    ),
    "custom datasets by the former name": (
        train("DATASETS.TEST", "('own_val',)"),
        ["own_val", "--val-json"],
    ),
}


@pytest.mark.parametrize("name", TRAIN)
def test_training_does_not_start(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = TRAIN[name]
    if "OUTPUT_DIR" not in arguments:
        arguments = [*arguments, "OUTPUT_DIR", "output"]
    before = contents(folder)
    sentence = ends_with(lambda: run_train_net(arguments), capsys)
    assert all(part in sentence for part in said), sentence
    assert "\n" not in sentence and len(sentence) < 500
    assert contents(folder) == before


# Datasets: (what is done to them, the type of issue, what the report names). What is done is
# the whole new text of custom.json, or a function of its content and of the folder of images.
Damage = Union[str, Callable[[dict[str, Any]], Any]]


def first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change the first annotation; an Ellipsis removes the key."""
    return lambda content: change(content["annotations"][0], changes)


def first_image(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: change(content["images"][0], changes)


def change(entry: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        entry[key] = value
        if value is ...:
            del entry[key]


def rle(counts: Any) -> Callable[[dict[str, Any]], None]:
    """Give the first annotation an RLE with these counts, or a function's of the image's area."""

    def damage(content: dict[str, Any]) -> None:
        size = [content["images"][0][side] for side in ("height", "width")]
        given = counts(size[0] * size[1]) if callable(counts) else counts
        content["annotations"][0]["segmentation"] = {"size": size, "counts": given}

    return damage


def image_bytes(data: Union[bytes, int]) -> Callable[[dict[str, Any]], None]:
    """Overwrite the first image, or keep its first so many bytes."""

    def damage(content: dict[str, Any]) -> None:
        path = Path("images") / content["images"][0]["file_name"]
        path.write_bytes(path.read_bytes()[:data] if isinstance(data, int) else data)

    return damage


def a_folder(content: dict[str, Any]) -> None:
    path = Path("images") / content["images"][0]["file_name"]
    path.unlink()
    path.mkdir()


def twice(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part].append(dict(content[part][0]))


ERRORS: dict[str, tuple[Damage, str, str]] = {
    "no JSON": ("{'images': []}", "unreadable", "line 1"),
    "an empty file": ("", "unreadable", "line 1"),
    "a cut file": ('{"images": [{"id": 1', "unreadable", "line 1"),
    "a list": ("[1, 2]", "not_a_dataset", "a list of 2"),
    "results": ('[{"image_id": 1, "score": 0.5}]', "not_a_dataset", "results"),
    "a number": ("3", "not_a_dataset", "single value"),
    "no images key": ('{"annotations": [], "categories": []}', "not_a_dataset", "images"),
    "images no list": (
        '{"images": {}, "annotations": [], "categories": []}',
        "not_a_dataset",
        "images",
    ),
    "only crowds": (
        lambda c: [annotation.update(iscrowd=1) for annotation in c["annotations"]],
        "no_objects",
        "iscrowd 0",
    ),
    "no image": (lambda c: c["images"].clear(), "no_images", ""),
    "no annotation": (lambda c: c["annotations"].clear(), "no_annotations", ""),
    "no category": (lambda c: c["categories"].clear(), "no_categories", ""),
    "no usable image": (
        lambda c: [image.update(file_name="x.png") for image in c["images"]],
        "no_images",
        "",
    ),
    "no usable annotation": (
        lambda c: [annotation.update(bbox=[]) for annotation in c["annotations"]],
        "no_annotations",
        "",
    ),
    "a category without a name": (
        lambda c: c["categories"][0].pop("name"),
        "bad_category",
        '{"id": 1}',
    ),
    "a category id twice": (twice("categories"), "same_category_id", "1"),
    "an image id twice": (twice("images"), "same_image_id", "1"),
    "an annotation id twice": (twice("annotations"), "same_annotation_id", "1"),
    "boxes in shares of the image": (
        lambda c: [a.update(bbox=[0.4, 0.5, 0.2, 1]) for a in c["annotations"]],
        "relative_boxes",
        "[0.4, 0.5, 0.2, 1]",
    ),
    "a category not declared": (first(category_id=9), "undeclared_category", "category 9"),
}
REMOVALS: dict[str, tuple[Damage, str, str]] = {
    "a missing image": (first_image(file_name="gone.png"), "missing_image", "gone.png"),
    "an empty image": (image_bytes(b""), "unreadable_image", "000001.png"),
    "a cut header": (image_bytes(20), "unreadable_image", "000001.png"),
    "words for an image": (image_bytes(b"no image"), "unreadable_image", "000001.png"),
    "a folder for an image": (a_folder, "unreadable_image", "000001.png"),
    "another size": (first_image(width=9999), "other_size", "not 9999 x"),
    "an image without height": (first_image(height=...), "bad_image", "000001.png"),
    "an image's id as text": (first_image(id="1"), "bad_image", "000001.png"),
    "an annotation of no image": (first(image_id=99), "no_such_image", "image 99"),
    "an annotation without id": (first(id=...), "bad_annotation", "image_id"),
    "a list for an annotation": (
        lambda c: c["annotations"].__setitem__(0, [1, 2]),
        "bad_annotation",
        "[1, 2]",
    ),
    "an annotation to ignore": (first(ignore=1), "ignored", "annotation 1"),
    "no box": (first(bbox=...), "bad_box", "annotation 1"),
    "a box of 3": (first(bbox=[1, 2, 3]), "bad_box", "[1, 2, 3]"),
    "a box of text": (first(bbox=["1", "2", "3", "4"]), "bad_box", "annotation 1"),
    "a box of NaN": (first(bbox=[1, 2, float("nan"), 4]), "bad_box", "NaN"),
    "an empty box": (first(bbox=[1, 2, 0, 4]), "empty_box", "[1, 2, 0, 4]"),
    "a negative box": (first(bbox=[9, 9, -3, 4]), "empty_box", "-3"),
    "a box outside": (first(bbox=[9999, 0, 5, 5]), "outside", "9999"),
    "a polygon of 2 points": (first(segmentation=[[1, 2, 3, 4]]), "bad_polygon", "annotation 1"),
    "a polygon of 7 numbers": (
        first(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        "bad_polygon",
        "annotation 1",
    ),
    "a polygon of text": (first(segmentation=[["1"] * 6]), "bad_polygon", "annotation 1"),
    "a flat polygon": (first(segmentation=[1, 2, 3, 4, 5, 6]), "bad_polygon", "annotation 1"),
    "no mask": (first(segmentation=[]), "no_mask", "annotation 1"),
    "an RLE of another size": (
        first(segmentation={"size": [2, 3], "counts": [2, 4]}),
        "bad_rle",
        "annotation 1",
    ),
    "an RLE that is no code": (rle("abc"), "bad_rle", "annotation 1"),
    "an RLE in another alphabet": (rle("\u00e9"), "bad_rle", "annotation 1"),
    "an RLE without an end": (rle("o" * 20), "bad_rle", "annotation 1"),
    "an empty RLE": (rle(""), "bad_rle", "annotation 1"),
    "an RLE with a negative count": (rle(lambda area: [-5, area + 5]), "bad_rle", "annotation 1"),
    "an RLE with half a count": (rle(lambda area: [0.5, area - 0.5]), "bad_rle", "annotation 1"),
    "an RLE of too few counts": (rle(lambda area: [area - 1]), "bad_rle", "annotation 1"),
    "a huge polygon": (
        first(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]]),
        "bad_polygon",
        "annotation 1",
    ),
    "iscrowd as text": (first(iscrowd="1"), "bad_crowd", '"1" of annotation 1'),
    "iscrowd of 2": (first(iscrowd=2), "bad_crowd", "2 of annotation 1"),
    "an RLE without counts": (first(segmentation={"size": [2, 3]}), "bad_rle", "annotation 1"),
}


def damage_custom(how: Damage) -> None:
    text = how
    if callable(how):
        content = json.loads(Path("custom.json").read_text())
        how(content)
        text = json.dumps(content)
    Path("custom.json").write_text(text)


@pytest.mark.parametrize("name", ERRORS)
def test_a_dataset_with_errors_prevents_a_run(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, issue_type, said = ERRORS[name]
    damage_custom(damage)
    before = contents(folder)
    arguments = train(*CUSTOM, "OUTPUT_DIR", "output")
    with pytest.raises(SystemExit, match="The dataset has errors"):
        run_train_net(arguments)
    shown = [
        line
        for line in capsys.readouterr().out.splitlines()
        if ISSUE_TYPES[issue_type].message in line
    ]
    assert len(shown) == 1 and shown[0].startswith(f"  {ERROR}") and said in shown[0]
    assert check_data.main(arguments) == 1
    assert contents(folder) == before


@pytest.mark.parametrize("name", REMOVALS)
def test_unusable_entries_are_removed(name: str, folder: Path) -> None:
    damage, issue_type, said = REMOVALS[name]
    whole = json.loads(Path("custom.json").read_text())
    damage_custom(damage)
    before = contents(folder)
    args = nonlocal_argument_parser().parse_args(train(*CUSTOM, "OUTPUT_DIR", "output"))
    cfg = load_config(args.config_file, args.opts)
    datasets = load_custom_datasets(cfg, args)
    shown = [
        line
        for line in str(datasets.reports["custom_train"]).splitlines()
        if ISSUE_TYPES[issue_type].message in line
    ]
    assert len(shown) == 1 and shown[0].startswith(f"  {REMOVED}") and said in shown[0]
    # As it is trained on.
    datasets.apply_to(cfg)
    datasets.write_and_log(cfg)
    used = DatasetCatalog.get("custom_train")
    lost = issue_type in ("missing_image", "unreadable_image", "bad_image", "other_size")
    of_first = sum(a["image_id"] == 1 for a in whole["annotations"])
    assert len(used) == len(whole["images"]) - lost
    assert sum(len(record["annotations"]) for record in used) == len(whole["annotations"]) - (
        of_first if lost else 1
    )
    after = contents(folder)
    del after["output/datasets/custom_train.json"]
    assert after == before


@pytest.mark.parametrize(
    "mask", [{"size": [2, 3], "counts": [-1, 7]}, [1, 2, 3, 4, 5, 6], "mask", [[1, 2, 3]]], ids=str
)
def test_masks_that_are_not_needed_do_not_end_a_run(mask: Any, folder: Path) -> None:
    damage_custom(first(segmentation=mask))
    arguments = train(*CUSTOM, "OUTPUT_DIR", "output", "MODEL.MASK_ON", "False")
    args = nonlocal_argument_parser().parse_args(arguments)
    cfg = load_config(args.config_file, args.opts)
    datasets = load_custom_datasets(cfg, args)
    issues = {issue.type: issue.count for issue in datasets.reports["custom_train"].issues}
    assert issues["unused_mask"] == 1
    datasets.apply_to(cfg)
    datasets.write_and_log(cfg)
    used = sum(len(record["annotations"]) for record in DatasetCatalog.get("custom_train"))
    assert used == len(json.loads(Path("custom.json").read_text())["annotations"])


def test_keypoints_must_be_named_and_of_one_length(folder: Path) -> None:
    def parse() -> argparse.Namespace:
        return nonlocal_argument_parser().parse_args(
            train(*CUSTOM, *KEYPOINTS, "OUTPUT_DIR", "output")
        )

    args = parse()
    with pytest.raises(ValueError, match="has errors"):
        load_custom_datasets(load_config(args.config_file, args.opts), args)

    def add(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["keypoints"] = ["nose", "tail"]
        for annotation in content["annotations"]:
            annotation["keypoints"] = [1, 1, 2, 2, 2, 2]
        content["annotations"][0]["keypoints"] = [1, 1, 2, 2, 2]
        content["annotations"][1]["keypoints"] = []

    damage_custom(add)
    report = load_custom_datasets(load_config(args.config_file, args.opts), args).reports[
        "custom_train"
    ]
    found = {issue.type: issue.count for issue in report.issues}
    assert found["bad_keypoints"] == 1 and found["no_keypoints"] == 1
    damage_custom(lambda c: [a.update(keypoints=[0] * 6) for a in c["annotations"]])
    with pytest.raises(ValueError, match="has errors"):
        load_custom_datasets(load_config(args.config_file, args.opts), args)
    damage_custom(lambda content: content["categories"][0].update(keypoints=["nose"]))
    with pytest.raises(ValueError, match="has errors"):
        load_custom_datasets(load_config(args.config_file, args.opts), args)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1", "I;16"])
def test_images_of_all_modes_are_valid(mode: str, folder: Path) -> None:
    """They have no issue, and are loaded in training."""
    image = Image.open("images/000001.png")
    name = "other.jpg" if mode == "CMYK" else "other.png"
    image = Image.new("I;16", image.size) if mode == "I;16" else image.convert(mode)
    image.save(f"images/{name}")
    damage_custom(first_image(file_name=name))
    args = nonlocal_argument_parser().parse_args(train(*CUSTOM, "OUTPUT_DIR", "output"))
    cfg = load_config(args.config_file, args.opts)
    datasets = load_custom_datasets(cfg, args)
    # Few images do not show all classes.
    assert {issue.type for issue in datasets.reports["custom_train"].issues} <= {"unused_category"}
    datasets.apply_to(cfg)
    read = CheckedDatasetMapper(cfg, is_train=False)(DatasetCatalog.get("custom_train")[0])
    assert read["image"].shape[0] == 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_image_is_named_in_training(
    workers: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its header is valid: only loading it shows that it is truncated."""
    for path in Path("images").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    options = ("OUTPUT_DIR", "new", "DATALOADER.NUM_WORKERS", workers, "SEED", "1")
    done = run_tool("train_net", *train(*CUSTOM, *options), fails=True, env=HERE)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    said = (
        "train_net.py: error: Training stopped at iteration 0. Failed to load image 'images/00000"
    )
    assert last.startswith(said) and "truncated" in last
    assert not list(Path("new").glob("*.pth"))


# The other command lines: tool, arguments, what is said.
LOOK = ["--config-file", str(PROJECT / "configs" / LAMPS), "--output", "output"]
LAZY = ["--config-file", str(PROJECT / "configs" / "lazy" / "mask_rcnn_R50_NL.py")]
LAZY_LAMPS = [
    *("dataloader.train.dataset.names=lamps_train", "dataloader.test.dataset.names=lamps_val"),
]
ANALYZE = ["--config-file", str(PROJECT / "configs" / LAMPS)]
SEE = ["--input", "good.png", *LOOK]
TOOLS: dict[str, tuple[str, list[str], list[str]]] = {
    "look: no input": ("visualize_attention", LOOK, ["--input"]),
    "look: no output": ("visualize_attention", ["--input", "good.png"], ["--output"]),
    "look: an input that matches nothing": (
        "visualize_attention",
        [*LOOK, "--input", "output"],
        ["No images", "output"],
    ),
    "look: a point": ("visualize_attention", [*SEE, "--point", "3;4"], ["3;4", "X,Y"]),
    "look: a block": ("visualize_attention", [*SEE, "--block", "res9"], ["res9", "res4.nl0"]),
    "look: an output that is a file": (
        "visualize_attention",
        [*LOOK[:2], "--input", "good.png", "--output", "a_file"],
        ["--output", "a_file"],
    ),
    "look: weights cut": (
        "visualize_attention",
        [*SEE, "--weights", "cut.pth"],
        ["cut.pth", "cannot be read"],
    ),
    "look: weights of another model": (
        "visualize_attention",
        [*SEE, "--weights", "other.pth"],
        ["other.pth", "No tensor"],
    ),
    "look: no blocks": (
        "visualize_attention",
        [*SEE, "MODEL.NONLOCAL.POSITIONS", "()"],
        ["MODEL.NONLOCAL.POSITIONS"],
    ),
    "look: weights with code": (
        "visualize_attention",
        [*SEE, "--weights", "evil.pkl"],
        ["evil.pkl", "posix.system"],
    ),
    "export: weights with code": (
        "export_model",
        ["--config-file", str(PROJECT / "configs" / LAMPS), "--output", "output"]
        + ["MODEL.WEIGHTS", "evil.pth"],
        ["evil.pth", "posix.system"],
    ),
    "measure: a dataset": (
        "measure_attention",
        [*LOOK, "--dataset", "lamp_val"],
        ["lamp_val", "lamps_val"],
    ),
    "measure: no image": ("measure_attention", [*LOOK, "--num-images", "0"], ["--num-images"]),
    "measure: no number": (
        "measure_attention",
        [*LOOK, "--num-queries", "many"],
        ["--num-queries"],
    ),
    "analyze: no file": ("analyze_blocks", ["--config-file", "no.yaml"], ["no.yaml"]),
    "analyze: no LazyConfig": ("analyze_blocks", ["--config-file", "no.py"], ["no.py"]),
    "analyze: a broken LazyConfig": (
        "analyze_blocks",
        ["--config-file", "broken.py"],
        ["broken.py"],
    ),
    "analyze: a size": ("analyze_blocks", [*ANALYZE, "--size", "0", "9"], ["--size", "at least 1"]),
    "analyze: depth": ("analyze_blocks", [*ANALYZE, "MODEL.RESNETS.DEPTH", "51"], ["51"]),
    "analyze: an output that is below a file": (
        "analyze_blocks",
        [*ANALYZE, "--json", "a_file/figures.json"],
        ["json", "a_file"],
    ),
    "benchmark: a shape": ("benchmark", ["--shape", "512"], ["512"]),
    "benchmark: a threads' number": ("benchmark", ["--threads", "0"], ["--threads"]),
    "benchmark: a GPU": ("benchmark", ["--device", "tpu"], ["tpu", "cuda"]),
    "benchmark: a model": ("benchmark", ["--config-file", "no.yaml"], ["no.yaml"]),
    "benchmark: an output that is a file": ("benchmark", ["--output", "a_file"], ["a_file"]),
    "lazy: no file": ("lazyconfig_train_net", ["--config-file", "no.py"], ["no.py"]),
    "lazy: broken": ("lazyconfig_train_net", ["--config-file", "broken.py"], ["broken.py"]),
    "lazy: YAML": ("lazyconfig_train_net", ["--config-file", "key.yaml"], ["key.yaml"]),
    "lazy: KEY VALUE": (
        "lazyconfig_train_net",
        [*LAZY, "train.max_iter", "3"],
        ["train.max_iter 3", "KEY=VALUE"],
    ),
    "lazy: an unknown key": (
        "lazyconfig_train_net",
        [*LAZY, "train.max_itr=3"],
        ["train.max_itr", "max_iter"],
    ),
    "lazy: a dataset": (
        "lazyconfig_train_net",
        [*LAZY, "dataloader.train.dataset.names=lamp_train"],
        ["lamp_train"],
    ),
    **{
        f"lazy: {name}": ("lazyconfig_train_net", [*LAZY, *options, *LAZY_LAMPS], said)
        for name, (options, said) in {
            "a position": (["model.backbone.bottom_up.positions=['res4[9]']"], ["'res4[9]'"]),
            "a model": (["model.roi_heads.num_classes=a"], ["model"]),
            "classes": (
                ["train.init_checkpoint=''"],
                ["model.roi_heads.num_classes is 80, but dataset 'lamps_train' has 3: amber"],
            ),
            "weights missing": (
                ["train.init_checkpoint=no.pth"],
                ["train.init_checkpoint", "no.pth"],
            ),
            "weights of another model": (
                ["train.init_checkpoint=other.pth"],
                ["No tensor", "other"],
            ),
            "weights with code": (["train.init_checkpoint=evil.pkl"], ["evil.pkl", "posix.system"]),
            "evaluation of what is not in the weights": (
                ["--eval-only", "train.init_checkpoint=backbone.pth"],
                ["backbone.pth", "does not match"],
            ),
            "evaluation without weights": (
                ["--eval-only", "train.output_dir=output", "train.init_checkpoint=''"],
                ["train.init_checkpoint is empty"],
            ),
            "resuming what is corrupt": (
                ["--resume", "train.output_dir=output"],
                ["no intact checkpoint"],
            ),
            "seed": (["train.seed=5000000000000000000000"], ["train.seed"]),
            "workers": (["dataloader.train.num_workers=-1"], ["num_workers", "at least 0"]),
            "no period": (["train.checkpointer.period=0"], ["train.checkpointer.period"]),
            "no period of logs": (["train.log_period=0"], ["train.log_period"]),
            "iterations": (["train.max_iter=0"], ["train.max_iter"]),
            "a URL": (
                ["model.roi_heads.num_classes=3", "train.output_dir=s3://bucket/output"],
                ["train.output_dir", "local"],
            ),
        }.items()
    },
}


@pytest.mark.parametrize("name", TOOLS)
def test_other_tools_exit_with_a_one_line_error(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, arguments, said = TOOLS[name]
    before = contents(folder)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    sentence = ends_with(
        lambda: runpy.run_path(str(tool_path(script)), run_name="__main__"), capsys
    )
    assert all(part in sentence for part in said), sentence
    assert "\n" not in sentence and len(sentence) < 500
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name", ["configuration: an unknown key", "weights: cut", "output: below a file"]
)
def test_processes_exit_with_that_error_and_exit_code_1(name: str, folder: Path) -> None:
    (flag, config, *options), said = TRAIN[name]
    before = contents(folder)
    done = run_tool("train_net", flag, config, *CUSTOM, *options, fails=True, env=HERE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(part in done.stderr.strip().splitlines()[-1] for part in said)
    assert contents(folder) == before
