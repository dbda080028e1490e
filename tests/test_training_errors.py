"""Errors that end a run: divergence, a full disk, out of memory; in runs of tools/train_net.py.

Mutations tried by hand; each makes at least one test here fail: checking a checkpoint without its
checksums; writing a file in place.
"""

from __future__ import annotations

import functools
import math
import os
import resource
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from tiny_training import Workspace, limit

from nonlocal_det.checkpoint.atomic_checkpoint import AtomicCheckpointer
from nonlocal_det.checkpoint.latest import is_intact
from nonlocal_det.engine.hooks import TrainingErrorHook
from nonlocal_det.errors import exit_on_error, is_out_of_memory
from nonlocal_det.utils.file_io import atomic_write


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a run that has been stopped after two iterations, in ``begun``."""
    workspace = Workspace(tmp_path_factory.mktemp("failure"))
    workspace.train("begun", "SOLVER.MAX_ITER", 2)
    (workspace.folder / "begun" / "model_final.pth").unlink()
    (workspace.folder / "begun" / "last_checkpoint").write_text("model_0000001.pth")
    return workspace


@pytest.fixture
def begun(workspace: Workspace, request: pytest.FixtureRequest) -> str:
    """The name of a copy of that run."""
    name = request.node.name.split("[")[0]
    subprocess.run(["cp", "-a", workspace.folder / "begun", workspace.folder / name], check=True)
    return name


def assert_kept(workspace: Workspace, output: str, said: str, checkpoint: str) -> None:
    """The run exited with a one-line error; its last checkpoint is valid, without stray files."""
    folder = workspace.folder / output
    assert "Traceback" not in said
    assert f"{checkpoint} is kept; --resume" in said.strip().splitlines()[-1]
    assert f"{checkpoint} is kept; --resume" in (folder / "log.txt").read_text()
    assert (folder / "last_checkpoint").read_text() == checkpoint
    assert is_intact(str(folder / checkpoint))
    weights = workspace.checkpoint(output, checkpoint)["model"].values()
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert not (folder / "model_final.pth").exists()
    assert not list(folder.glob("*.tmp"))


class Lossy(torch.nn.Module):
    """A model whose loss is given with its images."""

    def forward(self, batched_inputs):
        return {"loss": batched_inputs[0]["loss"]}


@pytest.mark.parametrize("by_name", [False, True])
def test_a_model_may_be_called_by_the_name_of_its_argument(by_name: bool) -> None:
    model, hook = Lossy(), TrainingErrorHook()
    hook.trainer = SimpleNamespace(model=model)
    hook.before_train()
    images = [{"file_name": "a.jpg", "loss": torch.tensor(math.nan)}]
    with pytest.raises(FloatingPointError, match="The loss is not finite: loss nan"):
        model(batched_inputs=images) if by_name else model(images)
    assert hook._images_seen() == "The last images in the model: a.jpg."
    hook.after_train()
    model(batched_inputs=images)


def test_a_loss_that_is_not_finite(workspace: Workspace, begun: str) -> None:
    said = workspace.train(begun, "--resume", "MODEL.RPN.LOSS_WEIGHT", 1e39, fails=True)
    sentence = said.strip().splitlines()[-1]
    assert "stopped at iteration 2." in sentence and "loss_rpn_cls inf" in sentence
    assert sentence.count("data/train/0000") == 2 and "Weights are finite" in sentence
    assert_kept(workspace, begun, said, "model_0000001.pth")


# After a warm-up of two iterations.
SUDDEN = ("SOLVER.WARMUP_METHOD", "constant", "SOLVER.WARMUP_ITERS", 2, "SOLVER.WARMUP_FACTOR")


@pytest.mark.slow
def test_training_that_diverges(workspace: Workspace) -> None:
    output = "diverges"
    said = workspace.train(output, *SUDDEN, 1e-18, "SOLVER.BASE_LR", 1e12, fails=True)
    sentence = said.strip().splitlines()[-1]
    assert "SOLVER.BASE_LR" in sentence and sentence.count("data/train/0000") == 2
    assert_kept(workspace, output, said, "model_0000001.pth")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(workspace: Workspace) -> None:
    """The loss of the step was finite; its gradients, times the rate, were not."""
    output, options = "infinite", ("SOLVER.BASE_LR", 3e38, "SOLVER.CHECKPOINT_PERIOD", 1)
    said = workspace.train(output, *SUDDEN, 1e-44, *options, fails=True)
    assert "model_0000002.pth was not written: tensors such as" in said
    assert_kept(workspace, output, said, "model_0000001.pth")


@pytest.mark.slow
def test_a_file_that_may_grow_no_more(workspace: Workspace, begun: str) -> None:
    before = functools.partial(limit, resource.RLIMIT_FSIZE, 1_000_000)
    said = workspace.train(begun, "--resume", before=before, fails=True)
    assert "File too large" in said and "SOLVER.CHECKPOINT_PERIOD" in said
    assert_kept(workspace, begun, said, "model_0000001.pth")
    workspace.train(begun, "--resume")  # with room again


@pytest.fixture
def small_disk(workspace: Workspace) -> str:
    """A folder on a file system of 12 MB: two checkpoints of 4.8 MB, and not three."""
    folder = workspace.folder / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield "small"
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_disk_full(workspace: Workspace, small_disk: str) -> None:
    said = workspace.train(small_disk, fails=True)
    assert "No space left on device" in said and "stopped at iteration 5." in said
    assert_kept(workspace, small_disk, said, "model_0000003.pth")


@pytest.mark.slow
def test_out_of_memory(workspace: Workspace, begun: str) -> None:
    """Images of 6000 pixels, in a process that may have 400 MB more than it has."""
    options = ("INPUT.MIN_SIZE_TRAIN", (6000,), "INPUT.MAX_SIZE_TRAIN", 6000)
    said = workspace.train(begun, "--resume", *options, before=take_little_memory, fails=True)
    sentence = said.strip().splitlines()[-1]
    assert "Out of memory" in sentence and "SOLVER.IMS_PER_BATCH" in sentence
    assert_kept(workspace, begun, said, "model_0000001.pth")


def take_little_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit(resource.RLIMIT_AS, pages * resource.getpagesize() + 400_000_000)


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        ("Killed", True),
        ("Bus error", True),
        ("Segmentation fault", False),
        ("Terminated", False),
        ("Aborted", False),
    ],
)
def test_a_worker_that_is_killed_is_out_of_memory(signal: str, expected: bool) -> None:
    error = RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {signal}. ")
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("name", "value", "saved"),
    [
        ("running_var", math.nan, False),
        ("running_mean", -math.inf, False),
        ("num_batches_tracked", 7, True),
        ("weight", math.inf, False),
        ("mask", math.inf, True),  # on purpose
        ("mask", math.nan, False),
    ],
)
def test_statistics_that_are_not_finite_are_not_saved(
    name: str, value: float, saved: bool, tmp_path: Path
) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    model[0].register_buffer("mask", torch.zeros(2))
    with torch.no_grad():
        getattr(model[0], name).fill_(value)
    checkpointer = AtomicCheckpointer(model, str(tmp_path))
    if saved:
        checkpointer.save("model_final")
    else:
        with pytest.raises(FloatingPointError, match=f"tensors such as 0.{name} are not finite"):
            checkpointer.save("model_final")
    assert (tmp_path / "model_final.pth").exists() == saved


def test_only_checkpoints_of_this_run_are_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    AtomicCheckpointer(model, str(tmp_path)).save("model_final", iteration=5)
    another = AtomicCheckpointer(model, str(tmp_path))
    another.resume_or_load("", resume=False)
    assert another.kept_checkpoint() == ""
    resumed = AtomicCheckpointer(model, str(tmp_path))
    resumed.resume_or_load("", resume=True)
    assert resumed.kept_checkpoint() == str(tmp_path / "model_final.pth")
    resumed.save("model_0000007", iteration=7)
    assert resumed.kept_checkpoint() == str(tmp_path / "model_0000007.pth")


def user_module(folder: Path) -> dict[str, Any]:
    """A module of the user's, with a function that fails and one that calls this package."""
    (folder / "user_module.py").write_text(
        "from nonlocal_det.utils.validation import check_positive_int\n"
        "def load():\n    raise ValueError('the third line')\n"
        "def check():\n    check_positive_int('x', 0)\n"
    )
    return runpy.run_path(str(folder / "user_module.py"))


def test_an_error_in_the_users_own_code_keeps_its_traceback(tmp_path: Path) -> None:
    user = user_module(tmp_path)
    DatasetCatalog.register("of_the_user", user["load"])
    try:
        with pytest.raises(ValueError, match="the third line"), exit_on_error():
            get_detection_dataset_dicts(["of_the_user"])
    finally:
        DatasetCatalog.remove("of_the_user")
    with pytest.raises(SystemExit, match="x is 0; it must be"), exit_on_error():
        user["check"]()  # the user's code called first


def test_files_are_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(str(path)) as file:
        file.write("first")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_write(str(path)) as file:
        file.write("second")
        raise KeyError
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "one bit", "zeros", "empty", "missing"])
def test_a_corrupt_checkpoint(workspace: Workspace, damage: str, tmp_path: Path) -> None:
    good = (workspace.folder / "begun" / "model_0000001.pth").read_bytes()
    contents = {
        "cut": good[:-1000],
        "one bit": good[:200_000] + bytes([good[200_000] ^ 1]) + good[200_001:],
        "zeros": bytes(len(good)),
        "empty": b"",
    }
    path = tmp_path / "model.pth"
    path.write_bytes(good)
    assert is_intact(str(path))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(contents[damage])
    assert not is_intact(str(path))
