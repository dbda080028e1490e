"""``--check-data``: report the issues of datasets, and do nothing else."""

from __future__ import annotations

from argparse import Namespace

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import load_config
from ..data.dataset_report import DatasetReport, print_reports
from ..modeling.predictions import predicted_counts
from .custom_data import custom_files, validate_files
from .trained_classes import read_trained_classes


def run_dataset_check(args: Namespace) -> bool:
    """Print the issues of the custom datasets or, without them, of the config's datasets.

    Args:
        args: Parsed flags of `nonlocal_argument_parser`.

    Returns:
        Whether the datasets can be used: no issue is an error.

    Raises:
        FileNotFoundError: If the config is missing.
        ValueError: If the config, a flag, or a dataset's kind is not valid.
    """
    cfg = load_config(args.config_file, args.opts)
    custom = custom_files(args)
    files = custom or _registered_files(cfg)
    trained = read_trained_classes(cfg, eval_only=args.eval_only, resume=args.resume)
    reports = validate_files(cfg, files, trained, renumber=bool(custom))
    if not custom:
        for report in reports.values():
            _check_num_classes(cfg, report)
    print_reports(reports.values())
    usable = not any(report.has_errors for report in reports.values())
    print("The data can be used." if usable else "The data cannot be used.")
    return usable


def _registered_files(cfg: CfgNode) -> dict[str, tuple[str, str]]:
    """Return annotation file and image root of each dataset of the config, by name."""
    files = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco":
            raise ValueError(
                f"Dataset {name!r} is not registered in COCO format: it cannot be checked."
            )
        files[name] = PathManager.get_local_path(metadata.json_file), metadata.image_root
    return files


def _check_num_classes(cfg: CfgNode, report: DatasetReport) -> None:
    """Check that the model has as many classes as the dataset; custom datasets set them."""
    key, count = predicted_counts(cfg).get("thing_classes", ("", 0))
    if key and report.classes and count != len(report.classes):
        report.add("num_classes", [f"{key} is {count}"])
