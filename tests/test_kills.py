"""Runs that are killed at random moments, with files removed or cut in between.

Whatever happens, no valid checkpoint is overwritten, and each run resumes from the newest valid
one or says in one sentence why not.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from test_resume import stop_while_writing
from tiny_training import DATASET, Workspace
from tool_process import HANG

from nonlocal_det.checkpoint.latest import is_intact, saved_checkpoints

ROUNDS = int(os.environ.get("NONLOCAL_DET_KILL_ROUNDS", 2))  # 30 have been tried
OPTIONS = (
    *("--resume", "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 100_000, "SEED", 1),
    *("DATASETS.TEST", [DATASET], "TEST.EVAL_PERIOD", 4, "INPUT.MIN_SIZE_TEST", 48),
)
FILES = ("last_checkpoint", "metrics.json", "config.yaml", "log.txt", ".lock", "run.json", "*.pth")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_kills_and_damage_lose_nothing(number: int, tmp_path: Path) -> None:
    workspace, rng = Workspace(tmp_path), random.Random(number)
    output, resumed, refused = tmp_path / "killed", 0, 0
    for _ in range(ROUNDS):
        valid = valid_checkpoints(output)
        run = workspace.start("killed", *OPTIONS)
        strike(run, output, rng, number)
        said = (tmp_path / "killed.said").read_text()
        assert "Traceback" not in said, said[-3000:]
        after = valid_checkpoints(output)
        assert valid.items() <= after.items()
        started = re.search(r"Starting training from iteration (\d+)", said)
        if started:
            assert int(started[1]) == max(map(iteration_of, valid), default=-1) + 1
            resumed += bool(valid)
        if run.exitcode == 1:
            assert "train_net.py: error: " in said.strip().splitlines()[-1], said[-3000:]
            refused += 1
            repair(output)
        else:
            assert run.exitcode == -number, said[-3000:]
        damage(output, rng)
    print(f"{ROUNDS} rounds of signal {number}: {resumed} resumed, {refused} refused")


def valid_checkpoints(output: Path) -> dict[str, bytes]:
    paths = filter(is_intact, saved_checkpoints(str(output)))
    return {os.path.basename(path): Path(path).read_bytes() for path in paths}


def iteration_of(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def strike(run, output: Path, rng: random.Random, number: int) -> None:
    """Send the signal while the run starts, trains or evaluates, or while it writes a file."""
    said = output.parent / "killed.said"
    kind, end = rng.choice(["starting", "running", "writing"]), time.monotonic() + HANG
    if kind != "starting":
        while "Starting training" not in said.read_text() and run.is_alive():
            assert time.monotonic() < end
            time.sleep(0.02)
    if kind == "writing" and run.is_alive():
        stop_while_writing(run.pid, output, rng)
    else:
        time.sleep(rng.uniform(0, 2))
    if run.is_alive():
        os.kill(run.pid, number)
        os.kill(run.pid, signal.SIGCONT)
    run.join(HANG)


def damage(output: Path, rng: random.Random) -> None:
    """Remove or cut one or two files of a run, and all but its newest checkpoints."""
    for path in sorted(output.glob("model_*.pth"))[:-5]:
        path.unlink()
    for pattern in rng.sample(FILES, 2):
        paths = sorted(output.glob(pattern))
        if paths and rng.random() < 0.5:
            rng.choice(paths[-2:]).unlink()
        elif paths:
            path = rng.choice(paths[-2:])
            os.truncate(path, rng.randint(0, path.stat().st_size))


def repair(output: Path) -> None:
    """Do what the message of a refused run says: remove what is corrupt."""
    for name in ("run.json", "last_checkpoint"):
        (output / name).unlink(missing_ok=True)
    for path in output.glob("model_*.pth"):
        if not is_intact(str(path)):
            path.unlink()
