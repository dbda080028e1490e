"""Custom datasets: from COCO files given on the command line to a config that uses them."""

from __future__ import annotations

import json
import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.utils import comm

from ..data.coco_validation import validate_coco
from ..data.dataset_report import DatasetReport, compare_splits, match_classes, print_reports
from ..utils.file_io import atomic_write
from .launch import on_first_local_process
from .trained_classes import read_trained_classes

# Names under which the datasets of the command line are registered.
TRAIN, VAL = "custom_train", "custom_val"
# The mean of COCO's 17 keypoint OKS sigmas.
OKS_SIGMA = 0.067


def add_dataset_options(parser: ArgumentParser) -> None:
    """Add the options that give the datasets to a parser."""
    group = parser.add_argument_group("custom datasets in COCO format")
    for split, purpose in (("train", "training"), ("val", "evaluation")):
        group.add_argument(f"--{split}-json", metavar="FILE", help=f"COCO JSON for {purpose}")
        group.add_argument(
            f"--{split}-images",
            metavar="DIR",
            help="image root of that JSON (default: the JSON's directory)",
        )


class _Source(NamedTuple):
    """What a dataset is registered with: the arguments of `register_coco_instances`."""

    metadata: dict[str, Any]
    json_file: str
    image_root: str


@dataclass(frozen=True)
class CustomDatasets:
    """The datasets given on the command line; possibly none.

    Attributes:
        sources: What each dataset is registered with, by name.
        overrides: Config values that the datasets determine, by key.
        reports: Report on each dataset by name; only in the first process of each machine.
    """

    sources: dict[str, _Source] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, DatasetReport] = field(default_factory=dict)

    def apply_to(self, cfg: CfgNode) -> None:
        """Register the datasets, and set the config to train on and evaluate them.

        Args:
            cfg: Config to change: its datasets, and what the model must predict for them.
        """
        if not self.sources:
            return
        for name, source in self.sources.items():
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
            register_coco_instances(name, *source)
        cfg.DATASETS.TRAIN = tuple(name for name in self.sources if name == TRAIN)
        cfg.DATASETS.TEST = tuple(name for name in self.sources if name == VAL)
        for key, value in self.overrides.items():
            cfg.merge_from_list([key, value])

    def write_and_log(self, cfg: CfgNode) -> None:
        """Write modified datasets to the output directory, and log reports and overrides.

        Args:
            cfg: Config after `apply_to`.
        """
        logger = logging.getLogger("detectron2")
        for name, report in self.reports.items():
            logger.info(str(report))
            if report.is_modified:
                path = self.sources[name].json_file
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with atomic_write(path) as file:
                    json.dump(report.dataset, file)
                logger.info(f"  The modified dataset is {path}.")
        if self.sources:
            overrides = ", ".join(f"{key} {value}" for key, value in self.overrides.items())
            logger.info(f"Set from the dataset: {overrides}")
            if not cfg.DATASETS.TEST:
                logger.info("Without --val-json nothing is evaluated.")
        comm.synchronize()


def load_custom_datasets(cfg: CfgNode, args: Namespace) -> CustomDatasets:
    """Validate the datasets given on the command line, in one process of each machine.

    Args:
        cfg: Config, which says whether masks and keypoints are needed.
        args: Parsed flags; without those for custom datasets there are none.

    Raises:
        ValueError: If a dataset has errors, after printing the reports; or if a flag is missing.
    """
    files = custom_files(args)
    needed, flag = (VAL, "--val-json") if args.eval_only else (TRAIN, "--train-json")
    if files and needed not in files:
        purpose = "--eval-only" if args.eval_only else "Training"
        raise ValueError(f"{purpose} on custom datasets needs {flag}.")
    if not files:
        return CustomDatasets()
    used = {name: files[name] for name in files if name == VAL or not args.eval_only}
    reports: dict[str, DatasetReport] = {}

    def validate() -> tuple[dict[str, _Source], dict[str, Any]]:
        trained = read_trained_classes(cfg, eval_only=args.eval_only, resume=args.resume)
        reports.update(validate_files(cfg, used, trained))
        if any(report.has_errors for report in reports.values()):
            print_reports(reports.values())
            raise ValueError("The dataset has errors; fix the lines marked 'error' above.")
        sources = {name: _source(name, report, cfg) for name, report in reports.items()}
        return sources, cfg_overrides_from_dataset(cfg, next(iter(reports.values())))

    # A large dataset takes gigabytes, and its images may be on a network disk.
    return CustomDatasets(*on_first_local_process(validate), reports)


def custom_files(args: Namespace) -> dict[str, tuple[str, str]]:
    """Return annotation file and image root of each dataset given on the command line, by name.

    Raises:
        ValueError: If an image root is given without annotations.
    """
    given, files = vars(args), {}  # a script with detectron2's parser has none of our flags
    for name, split in ((TRAIN, "train"), (VAL, "val")):
        json_file, images = given.get(f"{split}_json"), given.get(f"{split}_images")
        if images and not json_file:
            raise ValueError(f"--{split}-images needs --{split}-json, the annotations.")
        if json_file:
            files[name] = json_file, images or os.path.dirname(json_file) or "."
    return files


def validate_files(
    cfg: CfgNode,
    files: dict[str, tuple[str, str]],
    trained: Mapping[str, list[str]],
    *,
    renumber: bool = True,
) -> dict[str, DatasetReport]:
    """Validate datasets; compare the first with what the model was trained on, and the others.

    Args:
        cfg: Config, which says whether masks and keypoints are needed.
        files: Annotation file and image root of each dataset, by name.
        trained: Names that the model was trained on; see `read_trained_classes`.
        renumber: Whether categories in another order are renumbered.
    """
    classes, keypoints = (trained.get(key, []) for key in ("thing_classes", "keypoint_names"))
    reports: dict[str, DatasetReport] = {}
    for name, paths in files.items():
        report = validate_coco(*paths, masks=cfg.MODEL.MASK_ON, keypoints=cfg.MODEL.KEYPOINT_ON)
        if reports:
            compare_splits(next(iter(reports.values())), report, renumber=renumber)
        else:
            match_classes(report, classes, keypoints, "checkpoint", renumber=renumber)
        reports[name] = report
    return reports


def cfg_overrides_from_dataset(cfg: CfgNode, report: DatasetReport) -> dict[str, Any]:
    """Derive config values from the classes, masks and keypoints of a dataset.

    Args:
        cfg: Config, which says whether keypoints are needed.
        report: Report on the training set or, for evaluation, on the validation set.

    Returns:
        Values by config key.
    """
    num_classes = len(report.classes)
    overrides: dict[str, Any] = {
        "MODEL.ROI_HEADS.NUM_CLASSES": num_classes,
        "MODEL.RETINANET.NUM_CLASSES": num_classes,
    }
    objects = [a for a in report.dataset["annotations"] if not a["iscrowd"]]
    masks = [a["segmentation"] for a in objects if a.get("segmentation")]
    if not masks:
        overrides["MODEL.MASK_ON"] = False
    elif any(isinstance(mask, dict) for mask in masks):
        overrides["INPUT.MASK_FORMAT"] = "bitmask"
    if cfg.MODEL.KEYPOINT_ON:
        names = report.keypoints
        overrides["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"] = len(names)
        sigmas = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        if tuple(names) == COCO_PERSON_KEYPOINT_NAMES:
            sigmas = []  # stands for COCO's
        elif len(sigmas) != len(names):
            sigmas = [OKS_SIGMA] * len(names)
        overrides["TEST.KEYPOINT_OKS_SIGMAS"] = sigmas
    return overrides


def flip_map(names: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of keypoints that a horizontal flip swaps: ``left_x`` and ``right_x``."""
    by_lower_name = {name.lower(): name for name in names}
    partners = {name: name.lower().replace("left", "right") for name in names}
    return [
        (name, by_lower_name[partner])
        for name, partner in partners.items()
        if partner != name.lower() and partner in by_lower_name
    ]


def _source(name: str, report: DatasetReport, cfg: CfgNode) -> _Source:
    """What a dataset is registered with; a modified one will be in the output directory."""
    metadata: dict[str, Any] = {"thing_classes": report.classes}
    if report.keypoints:
        metadata["keypoint_names"] = report.keypoints
        metadata["keypoint_flip_map"] = flip_map(report.keypoints)
    json_file = report.json_file
    if report.is_modified:
        json_file = os.path.join(cfg.OUTPUT_DIR, "datasets", f"{name}.json")
    return _Source(metadata, json_file, report.image_root)
