"""The output directory: what a run must not overwrite, and one run at a time.

Mutations tried by hand; each makes at least one test here fail: a lock that DataLoader workers of a
killed run keep; `--resume` without a look at the optimizer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny_training import DATASET, Workspace, register
from tool_process import HANG, wait

from nonlocal_det.engine import load_and_check_cfg, nonlocal_argument_parser, setup
from nonlocal_det.engine.resume_check import changed_settings


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a finished run in ``first``; its dataset is known in this process, too."""
    workspace = Workspace(tmp_path_factory.mktemp("output_dir"))
    workspace.train("first", "SOLVER.MAX_ITER", 2)
    register(workspace.folder / "data")
    yield workspace
    DatasetCatalog.remove(DATASET)
    MetadataCatalog.remove(DATASET)


@pytest.fixture
def first(workspace: Workspace, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(workspace.folder / "first", tmp_path / "first"))


def parse(workspace: Workspace, output: Path, *arguments: Any) -> Namespace:
    config = ["--config-file", workspace.folder / "tiny.yaml"]
    return nonlocal_argument_parser().parse_args(
        [*map(str, [*config, *arguments, "OUTPUT_DIR", output])]
    )


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*")
    }


REFUSED = {
    "a new run": ([], ["checkpoints of another run (model_final.pth)", "--resume", "OUTPUT_DIR"]),
    "another model": (
        ["--resume", "MODEL.FPN.OUT_CHANNELS", "16"],
        ["model_final.pth', a checkpoint of another model", "of another shape"],
    ),
    "more blocks": (
        ["--resume", "MODEL.NONLOCAL.POSITIONS", "('res4[-2]', 'p3')"],
        ["a checkpoint of another model", "1 new blocks"],
    ),
    "fewer blocks": (
        ["--resume", "MODEL.NONLOCAL.POSITIONS", "()"],
        ["a checkpoint of another model", "unexpected in the checkpoint"],
    ),
    "another optimizer": (
        ["--resume", "SOLVER.OPTIMIZER", "AdamW"],
        ["a checkpoint of another optimizer"],
    ),
    "frozen parameters": (
        ["--resume", "MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.RESNETS.NORM", "FrozenBN"],
        ["--resume cannot continue"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_checkpoints_is_refused(
    case: str, workspace: Workspace, first: Path
) -> None:
    arguments, said = REFUSED[case]
    before = contents(first)
    with pytest.raises((ValueError, OSError)) as error:
        setup(parse(workspace, first, *arguments))
    sentence = str(error.value)
    assert all(part in sentence for part in said), sentence
    assert "\n" not in sentence and len(sentence) < 500
    assert contents(first) == before


def test_a_checkpoint_with_code_is_not_resumed(workspace: Workspace, first: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {first / 'ran'}",)

    saved = torch.load(first / "model_final.pth", weights_only=True)
    torch.save({**saved, "evil": Evil()}, first / "model_final.pth")
    with pytest.raises(ValueError, match=r"model_final\.pth' was not loaded.* posix\.system"):
        load_and_check_cfg(parse(workspace, first, "--resume"))
    assert not (first / "ran").exists()


def test_a_new_run_may_take_the_place_of_corrupt_checkpoints(
    workspace: Workspace, first: Path
) -> None:
    for path in first.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    load_and_check_cfg(parse(workspace, first))


def test_a_run_info_that_is_not_valid_is_refused_before_anything_is_written(
    workspace: Workspace, first: Path
) -> None:
    (first / "run.json").write_text("[1")
    before = contents(first)
    with pytest.raises(ValueError, match=r"not a valid run\.json"):
        setup(parse(workspace, first, "--resume"))
    assert contents(first) == before


def test_evaluation_needs_weights_or_a_checkpoint(workspace: Workspace, first: Path) -> None:
    test = ("DATASETS.TEST", f"('{DATASET}',)")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        load_and_check_cfg(parse(workspace, first, "--eval-only", *test))
    load_and_check_cfg(parse(workspace, first, "--eval-only", "--resume", *test))


def test_settings_that_have_changed_are_listed(workspace: Workspace, first: Path) -> None:
    options = ("SOLVER.MAX_ITER", 9, "INPUT.MIN_SIZE_TRAIN", "(40,)", "SEED", 1)
    cfg = load_and_check_cfg(parse(workspace, first, "--resume", *options)).cfg
    changed = ["INPUT.MIN_SIZE_TRAIN [40] (was [40, 48, 56])", "SOLVER.MAX_ITER 9 (was 2)"]
    assert changed_settings(cfg) == changed
    for text in ("MODEL: [1", "1", ""):
        (first / "config.yaml").write_text(text)
        assert changed_settings(cfg) == []


@pytest.mark.slow
def test_one_run_at_a_time(workspace: Workspace) -> None:
    """The lock ends with the process that holds it, though its workers live on for a while."""
    options = ("SOLVER.MAX_ITER", 100_000, "DATALOADER.NUM_WORKERS", 2)
    run = workspace.start("locked", *options)
    try:
        said, end = workspace.folder / "locked.said", time.monotonic() + HANG
        while "Starting training" not in said.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        refused = workspace.train("locked", "--resume", *options, fails=True)
        assert "error: Another run is training in OUTPUT_DIR" in refused, refused[-3000:]
        assert run.is_alive()
    finally:
        run.kill()
        wait(run)
    workspace.train("locked", "--resume", "SOLVER.MAX_ITER", 1)
