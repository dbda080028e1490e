"""Training on one's own data: from files named on the command line to a checked configuration."""

from __future__ import annotations

import json
import logging
import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..data.coco_validation import compare_splits, validate_coco
from ..data.dataset_report import Report
from ..utils.file_io import atomic_write

# Names under which detectron2 knows the sets given on the command line.
TRAIN, VAL = "own_train", "own_val"
# The mean of COCO's 17.
OKS_SIGMA = 0.067


def nonlocal_argument_parser(epilog: Optional[str] = None) -> ArgumentParser:
    """detectron2's flags, and those of one's own data."""
    parser = default_argument_parser(epilog)
    group = parser.add_argument_group("your own data, in COCO's format")
    for split, purpose in (("train", "to train on"), ("val", "to evaluate on")):
        group.add_argument(f"--{split}-json", metavar="FILE", help=f"annotations {purpose}")
        group.add_argument(
            f"--{split}-images",
            metavar="FOLDER",
            help="what their file names are relative to; by default the folder of the JSON",
        )
    group.add_argument(
        "--check",
        action="store_true",
        help="only report what is wrong with the data, or with the configuration's datasets",
    )
    return parser


@dataclass(frozen=True)
class CustomDatasets:
    """The sets that the command line names, by the names they are registered under; maybe none."""

    reports: dict[str, Report]

    def configure(self, cfg: CfgNode) -> None:
        """Register the sets, and have ``cfg`` train on and evaluate them, and fit its model."""
        if not self.reports:
            return
        for name, report in self.reports.items():
            _register(name, report, cfg.OUTPUT_DIR)
        cfg.DATASETS.TRAIN = tuple(name for name in self.reports if name == TRAIN)
        cfg.DATASETS.TEST = tuple(name for name in self.reports if name == VAL)
        for key, value in cfg_overrides_from_dataset(
            cfg, next(iter(self.reports.values()))
        ).items():
            cfg.merge_from_list([key, value])

    def finish(self, cfg: CfgNode) -> None:
        """Write what is other than in the user's files into the output folder, and log it all."""
        logger = logging.getLogger("detectron2")
        for name, report in self.reports.items():
            logger.info(str(report))
            if report.changed:
                _write(report, _changed_file(name, cfg.OUTPUT_DIR))
                logger.info(f"  What is used is in {_changed_file(name, cfg.OUTPUT_DIR)}.")
        if self.reports:
            settings = cfg_overrides_from_dataset(cfg, next(iter(self.reports.values())))
            logger.info("From the data: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
            if not cfg.DATASETS.TEST:
                logger.info("Without --val-json nothing is evaluated.")
        comm.synchronize()


def load_custom_datasets(cfg: CfgNode, args: Namespace) -> CustomDatasets:
    """Check the sets that the command line names.

    Raises:
        ValueError: if a set cannot be used, after printing why; for flags that do not fit.
    """
    reports = _reports(cfg, _own_files(args))
    if any(report.fatal for report in reports.values()):
        if comm.is_main_process():
            print("\n".join(map(str, reports.values())), flush=True)
        raise ValueError("The data cannot be used: mend what the lines above say stops it.")
    return CustomDatasets(reports)


def run_dataset_check(args: Namespace) -> bool:
    """Print what is wrong with the data; whether nothing keeps a run from starting.

    Raises:
        FileNotFoundError: for a missing configuration.
        ValueError: for a wrong configuration, or flags that do not fit.
    """
    cfg = load_config(args.config_file, args.opts)
    own = _own_files(args)
    reports = _reports(cfg, own or _registered_files(cfg))
    if not own:
        for report in reports.values():
            _check_model(cfg, report)
    print("\n".join(map(str, reports.values())))
    good = not any(report.fatal for report in reports.values())
    print("The data can be used." if good else "The data cannot be used.")
    return good


def _own_files(args: Namespace) -> dict[str, tuple[str, str]]:
    """The annotation file and the folder of each set that is given and will be used."""
    given, files = vars(args), {}  # without our flags, where a script has only detectron2's
    for name, split in ((TRAIN, "train"), (VAL, "val")):
        json_file, images = given.get(f"{split}_json"), given.get(f"{split}_images")
        if images and not json_file:
            raise ValueError(f"--{split}-images needs --{split}-json, the annotations.")
        if json_file:
            files[name] = json_file, images or os.path.dirname(json_file) or "."
    needed, flag = (VAL, "--val-json") if args.eval_only else (TRAIN, "--train-json")
    if files and needed not in files and not given.get("check"):
        what = "--eval-only" if args.eval_only else "Training"
        raise ValueError(f"{what} on your own data needs {flag}.")
    return {name: files[name] for name in files if name == VAL or not args.eval_only}


def _registered_files(cfg: CfgNode) -> dict[str, tuple[str, str]]:
    files = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco":
            raise ValueError(
                f"Dataset {name!r} is not registered in COCO's format: it cannot be checked."
            )
        files[name] = PathManager.get_local_path(metadata.json_file), metadata.image_root
    return files


def _reports(cfg: CfgNode, files: dict[str, tuple[str, str]]) -> dict[str, Report]:
    """What is wrong with each set, and between the first and the others."""
    reports: dict[str, Report] = {}
    for name, paths in files.items():
        report = validate_coco(*paths, masks=cfg.MODEL.MASK_ON, keypoints=cfg.MODEL.KEYPOINT_ON)
        if reports:
            compare_splits(next(iter(reports.values())), report)
        reports[name] = report
    return reports


def _check_model(cfg: CfgNode, report: Report) -> None:
    """A registered set must fit the model as it is configured."""
    node = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    number = cfg.MODEL[node].NUM_CLASSES
    if report.classes and number != len(report.classes):
        report.add("num_classes", [f"MODEL.{node}.NUM_CLASSES is {number}"])


def cfg_overrides_from_dataset(cfg: CfgNode, report: Report) -> dict[str, Any]:
    """The settings of a model with the classes, masks and keypoints of a dataset."""
    classes = len(report.classes)
    settings: dict[str, Any] = {
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "MODEL.RETINANET.NUM_CLASSES": classes,
    }
    objects = [a for a in report.content["annotations"] if not a["iscrowd"]]
    masks = [a["segmentation"] for a in objects if a.get("segmentation")]
    if not masks:
        settings["MODEL.MASK_ON"] = False
    elif any(isinstance(mask, dict) for mask in masks):
        settings["INPUT.MASK_FORMAT"] = "bitmask"
    if cfg.MODEL.KEYPOINT_ON:
        names = report.keypoints
        settings["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = len(names)
        sigmas = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        if tuple(names) == COCO_PERSON_KEYPOINT_NAMES:
            sigmas = []  # stands for COCO's
        elif len(sigmas) != len(names):
            sigmas = [OKS_SIGMA] * len(names)
        settings["TEST.KEYPOINT_OKS_SIGMAS"] = sigmas
    return settings


def flip_map(names: list[str]) -> list[tuple[str, str]]:
    """The keypoints that change places in a mirrored picture: ``left_x`` and ``right_x``."""
    by_lower_name = {name.lower(): name for name in names}
    partners = {name: name.lower().replace("left", "right") for name in names}
    return [
        (name, by_lower_name[partner])
        for name, partner in partners.items()
        if partner != name.lower() and partner in by_lower_name
    ]


def _register(name: str, report: Report, folder: str) -> None:
    metadata: dict[str, Any] = {"thing_classes": report.classes}
    if report.keypoints:
        metadata["keypoint_names"] = report.keypoints
        metadata["keypoint_flip_map"] = flip_map(report.keypoints)
    json_file = _changed_file(name, folder) if report.changed else report.json_file
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    register_coco_instances(name, metadata, json_file, report.image_root)


def _changed_file(name: str, folder: str) -> str:
    return os.path.join(folder, "datasets", f"{name}.json")


def _write(report: Report, path: str) -> None:
    """Once a machine."""
    if comm.get_local_rank():
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        json.dump(report.content, file)
