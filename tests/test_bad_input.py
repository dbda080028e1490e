"""The table of bad inputs: each ends with one readable sentence before anything starts.

Every row is tried in a folder that holds an earlier run's output; afterwards all files are as they
were, bit for bit, and no other is there. Rows run in this process, for speed, by the scripts' own
main functions; some run again as processes, for the exit status and for what the screen shows.

Tried by hand, and seen to fail: a check after the output folder's config.yaml is written; weights
loaded without looking at what fits; a dataset's report that stops at the first problem.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from PIL import Image

from nonlocal_det.data import register_lamps
from nonlocal_det.data.coco import annotation_file, ensure_dataset
from nonlocal_det.engine import Trainer

PROJECT = Path(__file__).parents[1]
LAMPS = "lamps_mask_rcnn_R18_NL.yaml"
OWN = ["--train-json", "own.json", "--train-images", "pictures"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lamps dataset, inputs of all kinds, and what an earlier run has left in output/."""
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
        monkeypatch.setattr(Trainer, name, lambda *_: pytest.fail("it started", pytrace=False))
    register_lamps(".")
    return tmp_path / "here"


def write_files(root: Path) -> None:
    (root / "output").mkdir()
    for name in ("config.yaml", "log.txt", "model_final.pth", "metrics.json", "last_checkpoint"):
        (root / "output" / name).write_text(f"an earlier run's {name}")
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
        "no_picture.jpg": "no picture",
        "broken.py": "model = (",
    }.items():
        (root / name).write_text(text)
    (root / "binary.yaml").write_bytes(bytes(range(256)))
    torch.save({"model": {"conv.weight": torch.ones(3, 3)}}, root / "other.pth")
    torch.save(
        {"model": {"roi_heads.box_predictor.cls_score.weight": torch.ones(81, 1024)}},
        root / "shapes.pth",
    )
    torch.save([1, 2, 3], root / "numbers.pth")
    torch.save(torch.nn.Linear(2, 2), root / "module.pth")
    stem = {"backbone.bottom_up.stem.conv1.weight": torch.ones(64, 3, 7, 7)}
    torch.save({"model": stem}, root / "backbone.pth")
    whole = (root / "other.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (root / "cut.pkl").write_bytes(pickle.dumps({"model": {"a": [1] * 100}})[:-20])
    Image.new("RGB", (64, 48)).save(root / "good.png")
    shutil.copytree(root / "lamps" / "train", root / "pictures")
    shutil.copy(annotation_file(str(root / "lamps"), "train"), root / "own.json")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tool(name: str) -> Any:
    path = PROJECT / "tools" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as a script has it
    spec = importlib.util.spec_from_file_location(f"tool_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(*options: str, config: str = LAMPS) -> list[str]:
    """Arguments of tools/train_net.py."""
    ours = PROJECT / "configs" / config
    return ["--config-file", str(ours) if ours.exists() else config, *options]


def ends_with(run: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command line ends with; its status is not 0."""
    with pytest.raises(SystemExit) as stop:
        run()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if isinstance(stop.value.code, str):  # printed by the interpreter, which exits with 1
        return stop.value.code
    assert stop.value.code not in (None, 0)
    return error.strip().splitlines()[-1]  # argparse's, below the usage


def run_train_net(arguments: list[str]) -> None:
    script = tool("train_net")
    script.main(script.argument_parser().parse_args(arguments))


CONFIGURATIONS = {
    "a missing file": (train(config="no_such.yaml"), ["no_such.yaml"]),
    "no file": (["--config-file", ""], ["configuration file"]),
    "a folder": (train(config="pictures"), ["pictures"]),
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
    "another type": (train("MODEL.NONLOCAL.SCALE", "often"), ["MODEL.NONLOCAL.SCALE", "bool"]),
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
    "unknown norm": (["MODEL.NONLOCAL.NORM", "IN"], ["'IN'", "'BN'"]),
    "reduction": (["MODEL.NONLOCAL.REDUCTION", "0"], ["REDUCTION", "0"]),
    "reduction beyond": (["MODEL.NONLOCAL.REDUCTION", "4096"], ["REDUCTION", "4096"]),
    "init": (["MODEL.NONLOCAL.INIT", "zeros"], ["zeros", "'he'"]),
    "groups": (
        ["MODEL.NONLOCAL.MECHANISM", "compact_generalized", "MODEL.NONLOCAL.GROUPS", "7"],
        ["7"],
    ),
    "kernel": (
        ["MODEL.NONLOCAL.MECHANISM", "compact_generalized", "MODEL.NONLOCAL.KERNEL", "rbf"],
        ["rbf"],
    ),
    "window": (["MODEL.NONLOCAL.MECHANISM", "grouped", "MODEL.NONLOCAL.WINDOW", "0"], ["0"]),
    "optimizer": (["SOLVER.OPTIMIZER", "Adam"], ["Adam", "AdamW"]),
    "schedule": (["SOLVER.LR_SCHEDULER_NAME", "Linear"], ["Linear"]),
    "steps": (["SOLVER.STEPS", "(20, 10)"], ["20"]),
    "batch": (["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH"]),
    "iterations": (["SOLVER.MAX_ITER", "-1"], ["SOLVER.MAX_ITER"]),
    "depth": (["MODEL.RESNETS.DEPTH", "51"], ["51"]),
    "architecture": (["MODEL.META_ARCHITECTURE", "MaskRCNN"], ["MaskRCNN"]),
    "a head's name": (["MODEL.ROI_BOX_HEAD.NAME", "BoxHead"], ["BoxHead"]),
    "backbone": (["MODEL.BACKBONE.NAME", "resnet"], ["resnet"]),
    "classes": (["MODEL.ROI_HEADS.NUM_CLASSES", "-3"], ["num_classes"]),
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
    "no dataset": (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN"]),
}
WEIGHTS = {
    "missing": ("no_such.pth", ["no_such.pth"]),
    "a folder": ("pictures", ["pictures"]),
    "empty": ("empty.pth", ["empty.pth", "cannot be read"]),
    "words": ("words.pth", ["words.pth", "cannot be read"]),
    "cut": ("cut.pth", ["cut.pth", "cannot be read"]),
    "a broken pickle": ("cut.pkl", ["cut.pkl", "cannot be read"]),
    "words as a pickle": ("words.pkl", ["words.pkl", "cannot be read"]),
    "numbers": ("numbers.pth", ["numbers.pth", "cannot be read"]),
    "a whole module": ("module.pth", ["module.pth", "cannot be read"]),
    "of another model": ("other.pth", ["other.pth", "Nothing", "conv.weight", "backbone"]),
    "of other shapes": ("shapes.pth", ["shapes.pth", "Nothing"]),
}
OUTPUTS = {
    "a file": ("a_file", ["OUTPUT_DIR", "a_file"]),
    "below a file": ("a_file/output", ["OUTPUT_DIR", "a_file/output"]),
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
    "images without annotations": (
        train("--train-images", "pictures"),
        ["--train-images", "--train-json"],
    ),
    "an unknown flag": (["--train-jsn", "own.json"], ["--train-jsn"]),
    "a flag without its value": (train("--num-gpus"), ["--num-gpus", "OUTPUT_DIR"]),
    "augmented keypoints": (
        train("TEST.AUG.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"),
        ["TEST.AUG.ENABLED", "MODEL.KEYPOINT_ON", "boxes and masks"],
    ),
    "own data of an earlier run": (
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
