"""Stopping and resuming, with real runs of tools/train_net.py that are really killed.

Tried by hand, and seen to fail: PLACEHOLDER
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from tiny_models import assert_same
from tiny_training import Place

from nonlocal_det.engine.checkpoint import is_whole
from nonlocal_det.engine.files import BESIDE

LONGER = ("SOLVER.MAX_ITER", 27, "SOLVER.CHECKPOINT_PERIOD", 1)
KILLS = int(os.environ.get("NONLOCAL_DET_KILLS", 50))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Place:
    """The same place, with a run that was never stopped in ``whole``."""
    place.train("whole", *LONGER)
    return place


def state(place: Place, output: str) -> dict[str, torch.Tensor]:
    """Weights and the optimiser's momentum."""
    saved = place.checkpoint(output)
    momentum = saved["trainer"]["_trainer"]["optimizer"]["state"]
    return {
        **saved["model"],
        **{f"{i}": buffers["momentum_buffer"] for i, buffers in momentum.items()},
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_gives_the_same_to_the_bit(whole: Place, workers: int) -> None:
    """Stopped between two lines of metrics.json, and between two loaded batches."""
    output = f"stopped{workers}"
    options = (*LONGER, "DATALOADER.NUM_WORKERS", workers)
    run = whole.start(output, *options)
    wait_for(whole.folder / output / "model_0000012.pth")
    run.kill()
    run.join()
    whole.train(output, "--resume", *options)
    assert_same(state(whole, output), state(whole, "whole"))
    assert whole.metrics(output) == whole.metrics("whole")
    starts = json.loads((whole.folder / output / "run.json").read_text())
    assert [start["resume"] for start in starts] == [False, True]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.001)


@pytest.mark.long
def test_many_kills_lose_nothing(whole: Place) -> None:
    """Killed at random moments, half of them inside the writing of a checkpoint.

    The reference was never killed. Whatever the moment, every file with the name of a checkpoint
    is whole.
    """
    output, rng = whole.folder / "killed", random.Random(0)
    options = ("--resume", "SOLVER.MAX_ITER", 60, "SOLVER.CHECKPOINT_PERIOD", 1)
    whole.train("unkilled", *options[1:])
    inside = 0
    for kill in range(KILLS):
        run = whole.start("killed", *options)
        if kill % 2:
            wait_for_writing(output, rng)
        else:
            time.sleep(rng.uniform(0, 1.5))
        run.kill()
        run.join()
        assert run.exitcode == -9, (whole.folder / "killed.said").read_text()[-3000:]
        inside += any(output.glob(f"*{BESIDE}"))
        broken = [str(path) for path in output.glob("*.pth") if not is_whole(str(path))]
        assert not broken
        if (output / "last_checkpoint").exists():
            assert (output / (output / "last_checkpoint").read_text()).exists()
    whole.train("killed", *options)
    print(f"{KILLS} kills, {inside} while a file was being written")
    assert inside >= KILLS // 5
    assert not list(output.glob(f"*{BESIDE}"))
    assert_same(state(whole, "killed"), state(whole, "unkilled"))
    assert whole.metrics("killed") == whole.metrics("unkilled")


def wait_for_writing(output: Path, rng: random.Random) -> None:
    """Until a file is being written, and up to some milliseconds more."""
    for old in output.glob(f"*{BESIDE}"):
        old.unlink()
    end = time.monotonic() + 120
    while not any(output.glob(f"*.pth{BESIDE}")):
        assert time.monotonic() < end
    time.sleep(rng.uniform(0, 0.02))
