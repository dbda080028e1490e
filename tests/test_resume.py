"""Stopping and resuming, with real runs of tools/train_net.py that are really killed.

Mutations tried by hand; each makes at least one test here fail: iterations that continue one random
state; checkpoints without the optimizer, as detectron2 0.5's are.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from tiny_models import assert_same
from tiny_training import DATASET, Workspace
from tool_process import HANG

from nonlocal_det.checkpoint.latest import has_checkpoints, is_intact, latest_checkpoint
from nonlocal_det.engine.hooks import truncate_metrics
from nonlocal_det.engine.run_info import commit_of
from nonlocal_det.utils.file_io import TMP_SUFFIX

PROJECT = Path(__file__).parents[1]

LONGER = ("SOLVER.MAX_ITER", 27, "SOLVER.CHECKPOINT_PERIOD", 1)
KILLS = int(os.environ.get("NONLOCAL_DET_KILLS", 10))  # 50 and more have been tried


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> Workspace:
    """The same workspace, with a run that was never stopped in ``whole``."""
    workspace.train("whole", *LONGER)
    return workspace


def state(workspace: Workspace, output: str) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's momentum."""
    saved = workspace.checkpoint(output)
    momentum = saved["trainer"]["_trainer"]["optimizer"]["state"]
    return {
        **saved["model"],
        **{f"{i}": buffers["momentum_buffer"] for i, buffers in momentum.items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_bit_exact(whole: Workspace, workers: int) -> None:
    """Stopped between two lines of metrics.json, and between two loaded batches."""
    output = f"stopped{workers}"
    options = (*LONGER, "DATALOADER.NUM_WORKERS", workers)
    train_until(whole, output, "model_0000012.pth", *options)
    whole.train(output, "--resume", *options)
    assert_same(state(whole, output), state(whole, "whole"))
    assert whole.metrics(output) == whole.metrics("whole")
    assert [start["resume"] for start in run_info(whole, output)] == [False, True]


def train_until(workspace: Workspace, output: str, file: str, *options: Any) -> None:
    """A run that is killed once that file is there, however slow or busy the machine."""
    run = workspace.start(output, *options, before=functools.partial(die_after, file))
    run.join(HANG)
    assert run.exitcode == -signal.SIGKILL, (workspace.folder / f"{output}.said").read_text()[
        -3000:
    ]


def die_after(file: str) -> None:
    """Let this process be killed in place of what it would do after that file."""
    replace = os.replace

    def replace_and_die(source: str, target: str) -> None:
        replace(source, target)
        if os.path.basename(target) == file:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die


@pytest.mark.slow
@pytest.mark.parametrize(("period", "expected"), [(2, [3, 6]), (3, [2, 6])])
def test_no_evaluation_is_lost(workspace: Workspace, period: int, expected: list[int]) -> None:
    """Neither one that the kill cut short, nor one that was not in metrics.json yet."""
    output = f"evaluated{period}"
    options = ("DATASETS.TEST", [DATASET], "TEST.EVAL_PERIOD", period, "INPUT.MIN_SIZE_TEST", 48)
    workspace.train(output, *options)
    train_until(workspace, f"{output}cut", "model_0000003.pth", *options)
    assert not (workspace.folder / f"{output}cut" / "metrics.json").read_text()
    workspace.train(f"{output}cut", "--resume", *options)
    metrics = workspace.metrics(f"{output}cut")
    assert [row["iteration"] for row in metrics if "bbox/AP" in row] == expected
    assert metrics == workspace.metrics(output)


@pytest.mark.slow
def test_without_a_seed_one_is_sampled_and_kept(workspace: Workspace) -> None:
    rate = ("SOLVER.WARMUP_ITERS", 0)
    workspace.train("unseeded", "SEED", -1, "SOLVER.MAX_ITER", 2, *rate)
    workspace.train("unseeded", "--resume", "SEED", -1, *rate)
    seeds = [start["seed"] for start in run_info(workspace, "unseeded")]
    assert seeds[0] == seeds[1] >= 0
    assert f"SEED: {seeds[0]}\n" in (workspace.folder / "unseeded" / "config.yaml").read_text()
    workspace.train("seeded", "SEED", seeds[0], *rate)
    assert_same(state(workspace, "unseeded"), state(workspace, "seeded"))
    workspace.train("other", "SEED", -1, "SOLVER.MAX_ITER", 1)
    assert run_info(workspace, "other")[0]["seed"] != seeds[0]


def run_info(workspace: Workspace, output: str) -> list[dict[str, Any]]:
    return json.loads((workspace.folder / output / "run.json").read_text())


@pytest.mark.slow
def test_the_run_info(workspace: Workspace) -> None:
    workspace.train("recorded", "SOLVER.MAX_ITER", 1)
    (start,) = run_info(workspace, "recorded")
    assert start["versions"]["torch"] == torch.__version__ and start["processes"] == 1
    assert datetime.fromisoformat(start["started"]).tzinfo and start["machine"]["cpus"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True)
    if commit.returncode == 0:
        assert start["git"]["nonlocal_det"]["commit"] == commit.stdout.decode().strip()
    weights = ("MODEL.WEIGHTS", workspace.folder / "recorded" / "model_final.pth")
    workspace.train("recorded", "--eval-only", *weights, "DATASETS.TEST", [DATASET])
    assert len(run_info(workspace, "recorded")) == 1
    (workspace.folder / "recorded" / "run.json").write_text("[1")
    said = workspace.train("recorded", "--resume", "SEED", -1, fails=True)
    assert "Traceback" not in said and "run.json is not a valid run.json" in said
    assert (workspace.folder / "recorded" / "run.json").read_text() == "[1"


def test_a_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert commit_of(str(tmp_path)) is None
    name = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    for command in (["init", "-q"], ["add", "a"], [*name, "commit", "-q", "-m", "m"]):
        (tmp_path / "a").write_text("1")
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    at = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True)
    assert commit_of(str(tmp_path)) == {"commit": at.stdout.strip(), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert commit_of(str(tmp_path)) == {"commit": at.stdout.strip(), "dirty": True}


@pytest.mark.slow
def test_a_corrupt_checkpoint_gives_way_to_the_newest_valid_one(workspace: Workspace) -> None:
    workspace.train("damaged")
    expected, folder = state(workspace, "damaged"), workspace.folder / "damaged"
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    (folder / "model_final.pth").write_bytes((folder / "model_final.pth").read_bytes()[:-1])
    (folder / "model_0000005.pth").unlink()
    (folder / "foreign.pth").write_bytes((folder / "model_0000001.pth").read_bytes())
    (folder / f"0123456789abcdef-model_0000005.pth{TMP_SUFFIX}").write_bytes(b"of a killed run")
    said = workspace.train("damaged", "--resume")
    assert "Starting training from iteration 4" in said
    assert "corrupt or missing: resuming from" in said
    assert_same(state(workspace, "damaged"), expected)
    assert not list(folder.glob(f"*{TMP_SUFFIX}"))

    for path in folder.glob("model_*.pth"):
        path.write_bytes(b"")
    said = workspace.train("damaged", "--resume", fails=True)
    assert "Traceback" not in said and "finds no intact checkpoint" in said
    assert (folder / "model_final.pth").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("tag", [None, b"\xff\n"])
def test_a_missing_or_wrong_last_checkpoint_loses_nothing(
    tag: Optional[bytes], workspace: Workspace
) -> None:
    output, folder = f"untagged{tag}", workspace.folder / f"untagged{tag}"
    workspace.train(output, "SOLVER.MAX_ITER", 4)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").unlink()
    if tag is not None:
        (folder / "last_checkpoint").write_bytes(tag)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    metrics = workspace.metrics(output)
    said = workspace.train(output, "--resume", "SOLVER.MAX_ITER", 5)
    assert "Starting training from iteration 4" in said
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert workspace.metrics(output)[: len(metrics)] == metrics


def save_all(folder: Path, *iterations: int) -> None:
    """Write checkpoints in turn, one second apart, each with ``last_checkpoint`` after it."""
    for second, iteration in enumerate(iterations):
        name = f"model_{iteration:07d}.pth"
        torch.save({"iteration": iteration}, folder / name)
        (folder / "last_checkpoint").write_text(name)
        for path in (folder / name, folder / "last_checkpoint"):
            os.utime(path, (second, second))


def test_the_checkpoint_to_resume_from(tmp_path: Path) -> None:
    def latest() -> str:
        return Path(latest_checkpoint(str(tmp_path))).name

    assert latest() == "" and not has_checkpoints(str(tmp_path))
    save_all(tmp_path, 9, 1, 3)  # a run that has overwritten files of a longer one
    assert latest() == "model_0000003.pth"
    torch.save({"iteration": 5}, tmp_path / "model_0000005.pth")  # killed before it was named
    assert latest() == "model_0000005.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")  # set back by hand
    assert latest() == "model_0000001.pth"
    (tmp_path / "last_checkpoint").unlink()
    assert latest() == "model_0000009.pth"
    torch.save({"iteration": 12}, tmp_path / "model_final.pth")
    assert latest() == "model_final.pth"
    (tmp_path / "model_final.pth").write_bytes(b"")
    assert latest() == "model_0000009.pth"
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    assert latest() == "" and not has_checkpoints(str(tmp_path))


@pytest.mark.parametrize(
    ("lines", "start", "kept"),
    [
        ((), 0, 0),
        ((19, 39), 40, 2),
        ((19, 39, 59), 40, 2),
        ((19, 39), 39, 1),
        ((19, 39), 0, 0),
        # An earlier run's lines, which one without --resume left, stay.
        ((19, 99, 19, 39), 30, 3),
    ],
)
def test_metrics_are_truncated_where_training_resumes(
    lines: tuple[int, ...], start: int, kept: int, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    whole = [json.dumps({"iteration": iteration, "loss": 1.0}) + "\n" for iteration in lines]
    path.write_text("".join(whole) + '{"iteration": 3, "lo')  # killed while it wrote
    assert truncate_metrics(str(path), start) == (lines[kept - 1] if kept else None)
    assert path.read_text() == "".join(whole[:kept])


@pytest.mark.parametrize("keep", [False, True])
def test_the_evaluation_of_a_finished_run_is_kept_if_it_is_extended(
    keep: bool, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    rows = [{"iteration": 5, "total_loss": 1.0}, {"iteration": 6, "bbox/AP": 2.0}]
    later = [{"iteration": 6, "total_loss": 1.0}, {"loss": 1.0}, [6], {"iteration": 7}]
    later.insert(0, {"iteration": 6, "health/block/entropy": 0.5})
    whole = [json.dumps(row) + "\n" for row in (*rows, *later)]
    path.write_text("".join(whole))
    assert truncate_metrics(str(path), 6, keep_evaluation=keep) == (6 if keep else 5)
    assert path.read_text() == "".join(whole[: 2 if keep else 1])


@pytest.mark.slow
def test_an_extended_run_keeps_its_evaluations(workspace: Workspace) -> None:
    options = ("DATASETS.TEST", [DATASET], "INPUT.MIN_SIZE_TEST", 48, "SOLVER.MAX_ITER")
    workspace.train("extended", *options, 2)
    first = workspace.metrics("extended")
    workspace.train("extended", "--resume", *options, 2)  # with nothing left to do
    assert workspace.metrics("extended") == first
    workspace.train("extended", "--resume", *options, 4)
    metrics = workspace.metrics("extended")
    assert metrics[: len(first)] == first
    assert [row["iteration"] for row in metrics if "bbox/AP" in row] == [2, 4]


@pytest.mark.slow
def test_many_kills_lose_nothing(whole: Workspace) -> None:
    """Killed at random moments, half of them inside the writing of a checkpoint.

    The reference was never killed. Whatever the moment, every file with the name of a checkpoint
    is valid.
    """
    output, rng = whole.folder / "killed", random.Random(0)
    options = ("--resume", "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER")
    inside = 0
    for kill in range(KILLS):
        run = whole.start("killed", *options, 100_000)
        if kill % 2:
            stop_while_writing(run.pid, output, rng)
        else:
            time.sleep(rng.uniform(0, 1.5))
        run.kill()
        run.join()
        assert run.exitcode == -9, (whole.folder / "killed.said").read_text()[-3000:]
        inside += any(output.glob(f"*{TMP_SUFFIX}"))
        broken = [str(path) for path in output.glob("*.pth") if not is_intact(str(path))]
        assert not broken
        if (output / "last_checkpoint").exists():
            assert (output / (output / "last_checkpoint").read_text()).exists()
    last = (output / "last_checkpoint").read_text()
    end = int(last[len("model_") : -len(".pth")]) + 4
    whole.train("killed", *options, end)
    whole.train("unkilled", *options, end)
    print(f"{KILLS} kills in {end} iterations, {inside} while a file was being written")
    # A file may still be finished between the last look at it and the signal.
    assert inside >= KILLS // 5
    assert not list(output.glob(f"*{TMP_SUFFIX}"))
    assert_same(state(whole, "killed"), state(whole, "unkilled"))
    assert whole.metrics("killed") == whole.metrics("unkilled")


def stop_while_writing(pid: int, output: Path, rng: random.Random) -> None:
    """Let a run stand still inside the writing of a checkpoint, some time after it began it.

    It is not the run's first: whatever the speed of the machine, each kill leaves it farther.
    """
    for old in output.glob(f"*{TMP_SUFFIX}"):
        old.unlink()
    longest = 0.02
    seen: set[Path] = set()
    end = time.monotonic() + HANG
    while True:
        wanted = len(seen) + rng.randint(2, 3)
        while len(seen) < wanted:
            assert time.monotonic() < end
            seen.update(output.glob(f"*.pth{TMP_SUFFIX}"))
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGSTOP)
        if any(output.glob(f"*.pth{TMP_SUFFIX}")):
            return
        os.kill(pid, signal.SIGCONT)
        longest /= 2
