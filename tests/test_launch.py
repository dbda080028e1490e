"""Distributed training over gloo, with real processes, by torchrun and by detectron2's flags.

Mutations tried by hand; each makes at least one test here fail: the statistics of one process in
place of those of all.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ddp_gradients import assert_gradients_agree, distance, one_step
from test_train import LAMPS, PROJECT, SMALL, train_net
from tiny_training import write_short_lamps
from tool_process import run_tool

from nonlocal_det.cli.train import main
from nonlocal_det.data import register_lamps

CONFIG = ("--config-file", str(PROJECT / "configs" / LAMPS))
RUN = (
    *(*SMALL, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATION_STEPS", "2"),
    *("MODEL.NONLOCAL.NORM", "SyncBN", "MODEL.RESNETS.NORM", "SyncBN"),
)
BY_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start(script, *arguments, by=(), datasets=""):
    """A script of this project, running; ``by``, if any, starts its processes."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *by, str(PROJECT / script), *map(str, arguments)],
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process):
    """What it printed, once it has ended well; ten minutes without an end are a hang."""
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The result of one iteration in two processes, with half of the images each."""
    file = tmp_path_factory.mktemp("halves") / "steps.pth"
    cases = (":1:", "GN:1:", "SyncBN:1:", ":2:", "SyncBN:1:bfloat16")
    output_of(start("tests/ddp_gradients.py", file, *cases, by=BY_TORCHRUN))
    return torch.load(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "norm"),
    [(":1:", ""), ("GN:1:", "GN"), ("SyncBN:1:", "BN"), (":2:", "")],
    ids=["no norm", "GN", "SyncBN", "two micro-batches each"],
)
def test_two_processes_give_the_gradients_of_one(halves, case, norm):
    whole = one_step(norm)
    assert_gradients_agree(halves[case]["gradients"], whole["gradients"])
    assert halves[case]["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for name, mean in whole["statistics"].items():
        torch.testing.assert_close(halves[case]["statistics"][name], mean, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_two_processes_in_bfloat16_are_near_one_in_float32(halves):
    whole = one_step("BN")
    assert distance(halves["SyncBN:1:bfloat16"]["gradients"], whole["gradients"]) < 0.02


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_short_lamps(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, datasets):
    """A run of two processes with two micro-batches each; one output of its FPN is unused."""
    output = tmp_path_factory.mktemp("trained")
    arguments = (*CONFIG, *RUN, "OUTPUT_DIR", output)
    process = start("tools/train_net.py", *arguments, by=BY_TORCHRUN, datasets=datasets)
    assert "naiveSyncBN replaces it in 21 layers" in output_of(process)
    return output


def results(folder):
    return (folder / "inference" / "coco_instances_results.json").read_text()


@pytest.mark.slow
def test_a_run_writes_one_model_and_a_log_of_each_rank(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"model_final.pth", "metrics.json", "log.txt", "log.txt.rank1"} <= names
    assert "Rank of current process: 1. World size: 2" in (trained / "log.txt.rank1").read_text()
    rows = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "total_loss" in row] == [1]
    assert {"bbox/AP50", "segm/AP50"} <= rows[-1].keys()


@pytest.mark.slow
def test_two_machines_evaluate_as_one_process(trained, datasets, tmp_path):
    """Machines whose first is this one, over the network's own interface."""
    weights = (*RUN, "MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR")
    train_net(LAMPS, "--eval-only", *weights, tmp_path / "one", datasets=datasets)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    flags = ("--num-machines", 2, "--dist-url", url, "--machine-rank")
    machines = [
        start(
            "tools/train_net.py",
            *(*CONFIG, "--eval-only", *flags, rank, *weights, tmp_path / "two"),
            datasets=datasets,
        )
        for rank in (0, 1)
    ]
    for machine in machines:
        output_of(machine)
    assert results(tmp_path / "two") == results(tmp_path / "one") == results(trained)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(trained, datasets):
    """By detectron2's flags, resuming what torchrun began."""
    options = (*RUN, "SOLVER.MAX_ITER", 100000, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", trained)
    flags = ("--resume", "--num-gpus", 2, "--dist-url", "auto")
    run = start("tools/train_net.py", *CONFIG, *flags, *options, datasets=datasets)
    log = trained / "log.txt"
    while "Starting training from iteration 2" not in log.read_text() and run.poll() is None:
        time.sleep(0.1)
    children = [child for child in children_of(run.pid) if "spawn_main" in command_of(child)]
    assert len(children) == 2, run.communicate()
    os.kill(children[1], signal.SIGKILL)
    printed, _ = run.communicate(timeout=600)
    assert run.returncode == 1 and "terminated with" in printed
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def children_of(pid):
    """By the parent that each process reports; not every kernel lists children."""
    children = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{pid}\n" in status.read_text():
                children.append(int(status.parent.name))
        except OSError:
            pass  # ended meanwhile
    return sorted(children)


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPUs lacks")
@pytest.mark.parametrize(
    ("flags", "options", "said"),
    [
        (
            ("--num-gpus", "2"),
            ("MODEL.DEVICE", "cuda"),
            ["has none", "--num-gpus 1", "MODEL.DEVICE cpu"],
        ),
        (("--num-gpus", "3"), (), ["SOLVER.IMS_PER_BATCH is 4", "multiple of 3"]),
        (("--num-machines", "2"), (), ["--dist-url tcp://HOST:PORT"]),
        (("--num-machines", "2", "--machine-rank", "2"), (), ["--machine-rank is 2", "0 to 1"]),
        ((), ("SOLVER.ACCUMULATION_STEPS", "3"), ["multiple of 3", "SOLVER.ACCUMULATION_STEPS"]),
        ((), ("SOLVER.ACCUMULATION_STEPS", "0"), ["SOLVER.ACCUMULATION_STEPS is 0", "at least 1"]),
        ((), ("SOLVER.AMP.ENABLED", "True"), ["'float16', which needs a GPU", "'bfloat16'"]),
        (
            (),
            ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "half"),
            ["'half'", "'float16', 'bfloat16'"],
        ),
    ],
)
def test_what_cannot_run_exits_with_a_one_line_error(flags, options, said, datasets, tmp_path):
    """In this process, for speed; nothing has started and nothing is written."""
    register_lamps(str(datasets))
    batch = ("SOLVER.IMS_PER_BATCH", "4", "OUTPUT_DIR", str(tmp_path / "output"))
    with pytest.raises(SystemExit) as stop:
        main([*CONFIG, *flags, *batch, *options])
    assert all(part in str(stop.value) for part in said), stop.value
    assert "\n" not in str(stop.value) and not (tmp_path / "output").exists()


def test_a_bad_key_is_reported_once_for_all_processes(datasets):
    flags = ("--num-gpus", 2, "--dist-url", "auto", "MODEL.DEVICE", "cpu", "SOLVER.AMP.DTIPE", "x")
    env = {"DETECTRON2_DATASETS": str(datasets)}
    run = run_tool("train_net", *CONFIG, *flags, env=env, fails=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.count("There is no configuration key SOLVER.AMP.DTIPE") == 1
