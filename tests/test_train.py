"""Real runs of tools/train_net.py: training, COCO evaluation, resuming.

Mutations tried by hand; each makes at least one test here fail: evaluating without loading the
weights; ignoring --resume.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_training import write_short_lamps
from tool_process import run_tool

PROJECT = Path(__file__).parents[1]
COCO = PROJECT.parent / "shared" / "data" / "coco"
LAMPS = "lamps_mask_rcnn_R18_NL.yaml"
SMALL = [
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0001"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "10", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "160"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),  # so that something is detected
]


def train_net(config: str, *arguments: object, datasets: Path) -> subprocess.CompletedProcess[str]:
    config_file = ("--config-file", PROJECT / "configs" / config)
    return run_tool("train_net", *config_file, *arguments, env=environment(datasets))


def environment(datasets: Path) -> dict[str, str]:
    return {"DETECTRON2_DATASETS": str(datasets)}


def last_results(output: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {key: value for key, value in rows[-1].items() if key.startswith(("bbox/", "segm/"))}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_short_lamps(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, datasets: Path) -> Path:
    output = tmp_path_factory.mktemp("lamps")
    done = train_net(LAMPS, *SMALL, "OUTPUT_DIR", output, datasets=datasets)
    assert "runs on the CPU" not in done.stdout  # it was asked for
    return output


@pytest.mark.slow
def test_training_writes_the_files_of_detectron2(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "last_checkpoint"} <= names
    assert (trained / "inference" / "coco_instances_results.json").exists()
    assert {"bbox/AP50", "segm/AP50", "bbox/AP-amber"} <= last_results(trained).keys()


@pytest.mark.slow
def test_evaluation_alone_gives_the_same_numbers(
    trained: Path, datasets: Path, tmp_path: Path
) -> None:
    weights = ("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path)
    done = train_net(LAMPS, "--eval-only", *SMALL, *weights, datasets=datasets)
    assert "no new block" in done.stdout
    first = json.loads((trained / "inference" / "coco_instances_results.json").read_text())
    second = json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())
    assert first and second == first


@pytest.mark.slow
def test_training_resumes(trained: Path, datasets: Path) -> None:
    options = ("--resume", *SMALL, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", trained)
    done = train_net(LAMPS, *options, datasets=datasets)
    assert "Starting training from iteration 2" in done.stdout
    assert torch.load(trained / "model_final.pth", weights_only=True)["iteration"] == 3


def few_coco_images(root: Path) -> Path:
    """Eight images of each split, with the names of all; return ``root``."""
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / "coco" / split).symlink_to(COCO / split)
        name = Path("annotations") / f"instances_{split}.json"
        content = json.loads((COCO / name).read_text())
        content["images"] = content["images"][:8]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (root / "coco" / name).write_text(json.dumps(content))
    return root


@pytest.mark.slow
@pytest.mark.skipif(not COCO.exists(), reason="needs some COCO 2017 in ../shared/data/coco")
def test_real_coco(tmp_path: Path) -> None:
    config, datasets = "mask_rcnn_R50_NL.yaml", few_coco_images(tmp_path / "datasets")
    options = (*SMALL, "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path)
    done = train_net(config, *options, datasets=datasets)
    assert "No GPU was found" in done.stdout or "cuda" in done.stdout
    assert "Starting training from iteration 0" in done.stdout
    weights = ("MODEL.WEIGHTS", tmp_path / "model_final.pth", "OUTPUT_DIR", tmp_path / "again")
    train_net(config, "--eval-only", *SMALL, *weights, datasets=datasets)
    name = Path("inference") / "coco_instances_results.json"
    assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()
