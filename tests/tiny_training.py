"""Runs of tools/train_net.py on a tiny model, in processes that start fast and may be killed."""

from __future__ import annotations

import functools
import json
import multiprocessing
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.data.datasets import register_coco_instances
from tiny_models import zoo_config
from tool_process import ROOT, start_script, wait

from nonlocal_det.data import LampsParams, write_dataset
from nonlocal_det.data.builtin import DATASETS
from nonlocal_det.data.lamps.writer import annotation_file

DATASET = "tiny_lamps"
IMAGE_PARAMS = LampsParams(side=(48, 80), num_shapes=(1, 2), shape_size=(16, 24), lamp_size=(8, 10))
OPTIONS = [
    *("MODEL.NONLOCAL.POSITIONS", ["res4[-2]"], "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.BACKBONE.NAME", "build_nonlocal_resnet_fpn_backbone"),
    *("DATASETS.TRAIN", [DATASET], "DATASETS.TEST", [], "DATALOADER.NUM_WORKERS", 0),
    *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.001, "SOLVER.WARMUP_ITERS", 3),
    *("INPUT.MIN_SIZE_TRAIN", [40, 48, 56], "SOLVER.MAX_ITER", 6, "SEED", 1),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 32, "SOLVER.CHECKPOINT_PERIOD", 2),
]


@dataclass
class Workspace:
    """A folder with the dataset and a config, in which runs have their output directories."""

    folder: Path
    model: str = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    options: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        write_dataset(str(self.folder / "data"), "train", 8, params=IMAGE_PARAMS)
        cfg = zoo_config(self.model, [*OPTIONS, *self.options])
        (self.folder / "tiny.yaml").write_text(cfg.dump())

    def start(self, output: str, *arguments: Any, before: Any = None) -> multiprocessing.Process:
        """Start a run in a process of its own; ``before`` is called in it first."""
        given = ["--config-file", self.folder / "tiny.yaml", *arguments]
        run = [*given, "OUTPUT_DIR", self.folder / output]
        said = self.folder / f"{output}.said"
        said.write_text("")
        prepare = functools.partial(_prepare, self.folder / "data", before)
        return start_script(ROOT / "tools" / "train_net.py", run, said, said, before=prepare)

    def train(self, output: str, *arguments: Any, before: Any = None, fails: bool = False) -> str:
        """Wait for a run to end; return its output."""
        process = self.start(output, *arguments, before=before)
        wait(process)
        said = (self.folder / f"{output}.said").read_text()
        assert process.exitcode == (1 if fails else 0), said[-5000:]
        return said

    def checkpoint(self, output: str, name: str = "model_final.pth") -> dict[str, Any]:
        return torch.load(self.folder / output / name, weights_only=True)

    def weights(self, output: str) -> dict[str, torch.Tensor]:
        return self.checkpoint(output)["model"]

    def metrics(self, output: str) -> list[dict[str, float]]:
        """The lines of metrics.json without timings."""
        clock = ("time", "data_time", "rank_data_time", "eta_seconds")
        lines = (self.folder / output / "metrics.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{key: row[key] for key in row if key not in clock} for row in rows]


def _prepare(data: Path, before: Any) -> None:
    """Register the dataset, and call ``before``, in the run's process."""
    register(data)
    if before is not None:
        before()


def register(data: Path) -> None:
    """Register the dataset of a workspace, in this process."""
    annotations = data / "annotations" / "instances_train.json"
    register_coco_instances(
        DATASET,
        {"thing_classes": list(IMAGE_PARAMS.categories)},
        str(annotations),
        str(data / "train"),
    )


def write_short_lamps(root: Path, name: str = "lamps") -> Path:
    """Write 20 images of a lamps dataset that the tools take for the whole one; return ``root``."""
    folder, dataset = str(root / name), DATASETS[name]
    for split, count in (("train", 12), ("val", 8)):
        write_dataset(folder, split, count, params=dataset.params)
        file = Path(annotation_file(folder, split))
        content = json.loads(file.read_text())
        content["info"]["count"] = dataset.splits[split]
        file.write_text(json.dumps(content))
    return root


def limit(kind: int, amount: int) -> None:
    """Let this process have no more of something."""
    resource.setrlimit(kind, (amount, amount))
