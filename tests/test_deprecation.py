"""Former names: each works, and warns with the new one."""

from __future__ import annotations

import argparse
import importlib
import warnings

import pytest
import torch
from detectron2.engine import default_argument_parser

from nonlocal_det.cli import check_data, train
from nonlocal_det.engine import GradAccumTrainer
from nonlocal_det.utils.deprecation import (
    RenamedOption,
    renamed_arguments,
    renamed_attributes,
    renamed_method,
    renamed_property,
    renamed_value,
)

NAMES = {
    "nonlocal_det.engine": {
        "Step": "GradAccumTrainer",
        "RunFailure": "TrainingError",
        "WholeCheckpointer": "AtomicCheckpointer",
        "argument_parser": "nonlocal_argument_parser",
        "check_data": "run_dataset_check",
        "check_dataset": "check_dataset_registered",
        "checked_config": "load_and_check_cfg",
        "for_all_processes": "wrap_ddp",
        "one_sentence_errors": "exit_on_error",
    },
    "nonlocal_det.data": {"draw_picture": "render_image", "picture_rng": "image_rng"},
}


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(module, *names) for module, renamed in NAMES.items() for names in renamed.items()],
)
def test_former_public_names(module: str, old: str, new: str) -> None:
    package = importlib.import_module(module)
    with pytest.warns(FutureWarning, match=f"^{module}.{old} is now {new};") as caught:
        value = getattr(package, old)
    assert value is getattr(package, new)
    assert caught[0].filename == __file__  # the warning points to the user's line


def test_an_attribute_that_never_was() -> None:
    with pytest.raises(AttributeError, match="module 'm' has no attribute 'oldest'"):
        renamed_attributes("m", {"old": "new"})("oldest")


def test_a_former_keyword_of_the_trainer() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(FutureWarning, match="passes=.* is now accumulation_steps="):
        trainer = GradAccumTrainer(model, [], optimizer, passes=3)
    assert trainer.accumulation_steps == 3


def test_former_values() -> None:
    renamed = {"he": "kaiming"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [renamed_value("INIT", value, renamed) for value in ("kaiming", 3)] == ["kaiming", 3]
    with pytest.warns(FutureWarning, match="^INIT 'he' is now 'kaiming';"):
        assert renamed_value("INIT", "he", renamed) == "kaiming"


def test_former_arguments_methods_and_properties() -> None:
    class Camera:
        @renamed_arguments(images="num_images")
        def shoot(self, num_images: int = 1) -> int:
            return num_images

        @property
        def lens_name(self) -> str:
            return "50 mm"

        snap = renamed_method("snap", "shoot")
        lens = renamed_property("lens", "lens_name")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Camera().shoot(num_images=2) == 2
    with pytest.warns(FutureWarning, match=r"shoot\(images=\) is now num_images="):
        assert Camera().shoot(images=3) == 3
    with pytest.warns(FutureWarning, match="Camera.snap is now shoot"):
        assert Camera().snap(4) == 4
    with pytest.warns(FutureWarning, match="Camera.lens is now lens_name"):
        assert Camera().lens == "50 mm"
    with pytest.raises(TypeError, match="both num_images= and its old name, images="):
        Camera().shoot(images=3, num_images=3)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    renamed = {
        "--images": parser.add_argument("--num-images", type=int, default=5, help="how many"),
        "--fast": parser.add_argument("--skip-dense", action="store_true"),
        "--what": parser.add_argument("--target", choices=["aggregation", "block"]),
        "--at": parser.add_argument("--point", action="append"),
    }
    for old, action in renamed.items():
        parser.add_argument(old, action=RenamedOption, renamed=action)
    return parser


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--images", "7"], ["--num-images", "7"]),
        (["--fast"], ["--skip-dense"]),
        (["--what", "block"], ["--target", "block"]),
        (["--at", "1", "--at", "2"], ["--point", "1", "--point", "2"]),
    ],
)
def test_former_options(old: list[str], new: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = parser().parse_args(new)
    assert expected != parser().parse_args([])
    with pytest.warns(FutureWarning, match=f"^{old[0]} is now {new[0]};"):
        assert parser().parse_args(old) == expected
    assert old[0] not in parser().format_help().replace(new[0], "")


def test_values_of_former_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--images", "many"], ["--what", "sums"]):
        with pytest.raises(SystemExit):
            parser().parse_args(arguments)
        assert arguments[1] in capsys.readouterr().err


def test_check_data_by_its_former_option() -> None:
    flags = ["--train-json", "a.json"]
    with pytest.warns(FutureWarning, match="--check is now --check-data"):
        assert train.parse_args(["--check", *flags]) == check_data.parse_args(flags)


def test_train_takes_all_of_detectron2s_flags() -> None:
    given = vars(train.parse_args([]))
    expected = vars(default_argument_parser().parse_args([]))
    assert given.items() >= expected.items()
