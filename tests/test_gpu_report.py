"""The report on a GPU: its parts in miniature on the CPU, and on a GPU where there is one.

Mutations tried by hand; each makes at least one test here fail: a check that always passes, or
allows 250 times as much; large activations that always pass; an exit code of 0 in spite of
failures; an error among the checks that is none; tasks that start too late; time that a part leaves
lost to the next; nothing written after each part; NaN in the JSON; folders in errors; a dense path
that is not known, and backends that are tried for tiles; a kernel's time counted once; skipped rows
and the first sentence missing on the page; a ratio upside down; trainings left running; the wrong
Python in the Makefile.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_training import write_short_lamps
from tool_process import run_tool
from torch.autograd import DeviceType

from nonlocal_det.benchmark.gpu_report import run as gpu_report
from nonlocal_det.benchmark.gpu_report import training
from nonlocal_det.benchmark.gpu_report.exactness import (
    Check,
    check_block,
    check_large_activations,
)
from nonlocal_det.benchmark.gpu_report.kernels import (
    Call,
    longest_kernels,
    measure_kernels,
    path_of,
    refusal,
)
from nonlocal_det.benchmark.gpu_report.page import make_page
from nonlocal_det.benchmark.gpu_report.parts import PARTS, Part, Task
from nonlocal_det.cli.benchmark import main
from nonlocal_det.data import register_lamps
from nonlocal_det.layers import PAIRWISE, non_local

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["kernels", "tables", "exactness", "detectors", "activations", "training"]
CHECKS = [part for part in PARTS if part.checks]
ATTENTION = {
    "gaussian": "softmax_attention",
    "embedded_gaussian": "softmax_attention",
    "dot_product": "dot_product_attention",
    "concatenation": "concatenation_attention",
}
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


# The whole command.


@pytest.mark.slow
def test_without_a_gpu_the_command_checks_itself(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    done = run_tool("benchmark", "--gpu-report", "--output", tmp_path, env=environment)
    assert "There is no GPU here" in done.stdout
    text = (tmp_path / "gpu_report.json").read_text()
    page = (tmp_path / "gpu_report.md").read_text()
    report = json.loads(text)
    assert list(report["parts"]) == NAMES and not report["failures"]
    for name, entry in report["parts"].items():
        missing = "skipped" if name == "training" else "name"
        assert entry["rows"] and all(missing in row for row in entry["rows"])
        assert not any("error" in row for row in entry["rows"])
        assert f"## {entry['title']}" in page
    assert page == make_page(report)
    assert report["machine"]["detectron2"] in page and report["machine"]["torch"] in page
    for written in (text, page, done.stdout.replace(str(tmp_path), "")):
        assert not re.search(r"(?<![\w.])/\w+/", written)


@ON_GPU
@pytest.mark.slow
def test_on_a_gpu_every_result_is_right(tmp_path):
    assert main(["--gpu-report", "--budget", "240", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert report["device"] == "cuda" and report["parts"]["exactness"]["rows"]


def report_of(parts, budget=600.0, keep=lambda report: None, run=gpu_report.run_here):
    options = {"keep": keep, "run": run, "parts": parts, "show": lambda line: None}
    return gpu_report.make_report("cpu", budget, **options)


def break_attention(monkeypatch, name, breaking):
    right = getattr(non_local, name)
    monkeypatch.setattr(non_local, name, lambda *given: breaking(right(*given)))


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_a_wrong_kernel_is_a_failure_of_its_own_pairwise_function(monkeypatch, pairwise):
    break_attention(monkeypatch, ATTENTION[pairwise], lambda y: y * 1.3)
    failed = {failure.split(": ")[1].split(",")[0] for failure in report_of(CHECKS)["failures"]}
    assert failed == {p for p in PAIRWISE if ATTENTION[p] == ATTENTION[pairwise]}


def test_wrong_numbers_end_the_command_with_1(monkeypatch, tmp_path, capsys):
    break_attention(monkeypatch, "dot_product_attention", lambda y: y * torch.nan)
    short = functools.partial(gpu_report.make_report, parts=CHECKS)
    monkeypatch.setattr(gpu_report, "make_report", short)
    monkeypatch.setattr(gpu_report, "run_in_processes", gpu_report.run_here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--gpu-report", "--output", str(tmp_path)]) == 1
    assert "FAILED: Exactness: dot_product, float32" in capsys.readouterr().out
    page = (tmp_path / "gpu_report.md").read_text()
    assert page.startswith("# GPU report\n\nThere is no GPU here: ")
    assert "not finite" in page and "**failed**" in page and "of the checks failed:**" in page
    # NaN is no JSON.
    json.loads((tmp_path / "gpu_report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu-report", "--pairwise", "gaussian"), "leave out --pairwise"),
        (("--gpu-report", "--batch-size", "2"), "leave out --batch-size"),
        (("--budget", "5"), "--gpu-report, which is missing"),
        (("--gpu-report", "--budget", "0"), "at least 1"),
    ],
)
def test_options_without_effect_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_user_s_file_is_kept(tmp_path):
    (tmp_path / "gpu_report.md").write_text("mine")
    with pytest.raises(SystemExit, match="gpu_report.md"):
        main(["--gpu-report", "--output", str(tmp_path)])
    assert (tmp_path / "gpu_report.md").read_text() == "mine"


# Errors, time and interruptions.


def raise_error():
    raise RuntimeError("CUDA out of memory in /home/user/kernels.cu\nand more")


def part_of(*tasks, checks=False, name="one"):
    return Part(name, name.title(), 0.4, lambda device, deadline: list(tasks), checks)


GOOD, BAD = Task("good", lambda: {"passed": True}), Task("bad", raise_error)


@pytest.mark.parametrize("checks", [False, True])
def test_an_error_is_one_line_and_the_rest_goes_on(checks):
    parts = [part_of(BAD, GOOD, checks=checks), part_of(GOOD, name="two")]
    report = report_of(parts)
    error = "RuntimeError: CUDA out of memory in kernels.cu"
    good = {"name": "good", "passed": True}
    assert report["parts"]["one"]["rows"] == [{"name": "bad", "error": error}, good]
    assert report["parts"]["two"]["rows"] == [good]
    assert report["failures"] == (["One: bad"] if checks else [])


def test_what_no_longer_fits_is_skipped_with_the_reason(monkeypatch):
    clock = [0.0]

    def work():
        clock[0] += 30
        return {}

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    long = Task("long", work, seconds=50)
    # Shares are 40 s, and what the first part leaves is the second's.
    report = report_of([part_of(Task("short", work)), part_of(long, long, name="two")], budget=100)
    assert report["parts"]["one"]["rows"] == [{"name": "short"}]
    assert report["parts"]["two"]["rows"] == [
        {"name": "long", "skipped": "50 s were left; it needs about 50 s"},
    ] * 2 and clock == [30]
    report = report_of([part_of(Task("short", work), Task("short", work), GOOD)], budget=100)
    assert [*report["parts"]["one"]["rows"][2]] == ["name", "skipped"]


def test_all_is_skipped_without_time():
    report = report_of(PARTS, budget=0.0)
    rows = [row for entry in report["parts"].values() for row in entry["rows"]]
    assert rows and all(row["skipped"].startswith("0 s were left") for row in rows)
    assert "No result was checked." in report_page(report)


def report_page(report):
    return make_page(json.loads(json.dumps(report, allow_nan=False)))


def test_an_interruption_loses_nothing():
    def interrupt():
        raise KeyboardInterrupt

    kept = []
    parts = [part_of(GOOD), part_of(GOOD, Task("interrupted", interrupt), name="two")]
    with pytest.raises(KeyboardInterrupt):
        report_of(parts, keep=lambda report: kept.append(json.dumps(report)))
    last = json.loads(kept[-1])["parts"]
    assert len(kept) == 2 and last["one"]["rows"] == last["two"]["rows"] != []


def tasks_that_end_their_process(device, deadline):
    """In a process of its own."""
    return [
        Task("pid", process_id),
        Task("dies", functools.partial(os._exit, 3)),
        Task("raises", raise_error),
        Task("pid", process_id),
        Task("hangs", functools.partial(time.sleep, 600)),
        Task("late", process_id),
    ]


def process_id():
    return {"pid": os.getpid()}


@pytest.mark.slow
def test_tasks_in_processes_die_raise_and_hang_alone():
    part = Part("one", "One", 1.0, tasks_that_end_their_process)
    first = gpu_report.run_in_processes(part, "cpu", *[time.monotonic() + 500] * 2)
    assert next(first)["pid"] != os.getpid()
    first.close()
    # Now that there is a server, processes start at once. The deadline passes while one hangs.
    start = time.monotonic()
    rows = list(gpu_report.run_in_processes(part, "cpu", start + 20, start + 20.5))
    assert [row["name"] for row in rows] == ["pid", "dies", "raises", "pid", "hangs", "late"]
    assert rows[1]["error"] == "its process ended with exit code 3"
    assert rows[2]["error"].startswith("RuntimeError: CUDA out of memory")
    assert len({os.getpid(), rows[0]["pid"], rows[3]["pid"]}) == 3
    assert rows[4]["error"] == "it did not end in time" and "skipped" in rows[5]


# The page.


def test_paths_lose_their_folders():
    told = gpu_report.one_line("no file '/home/a b/c.d/x-y.json',\n  and/or 1/2 s, a/b/c, /tmp/z")
    assert told == "no file 'a b/c.d/x-y.json', and/or 1/2 s, a/b/c, z"


def test_the_page_is_made_of_the_json_alone():
    kernel = {
        "name": "64, float16, training",
        "taken": "dense",
        "kernels": ["gemm|a"],
        "seconds": 0.002,
        "bytes": 3 * 2**20,
        "bytes_per_weight": 4.0,
        "dense": True,
        "alone": {"flash": {"refused": "head width"}, "dense": {"seconds": 0.0021}},
    }
    case = {
        "name": "block",
        "fast_seconds": 0.001,
        "fast_bytes": 2**20,
        "sdpa_seconds": 0.0005,
        "sdpa_bytes": 2**21,
    }
    variants = {"no block": {"AP": 45.5, "AP50": 55.66, "seconds": 61.0}}
    rows = {
        "kernels": [kernel, {"name": "late", "skipped": "0 s were left"}],
        "tables": [case, {"name": "broken", "error": "RuntimeError: no"}],
        "training": [{"name": "far", "dataset": "d", "iterations": 9, "variants": variants}],
    }
    parts = {
        name: {"title": f"Part {name}", "checks": False, "rows": rows[name], "seconds": 1.5}
        for name in rows
    }
    report = {"machine": {"device": "H"}, "device": "cuda", "failures": [], "parts": parts}
    page = report_page(report)
    assert "There is no GPU" not in page and "| device | H |" in page
    assert "holds all attention weights with 64, float16, training." in page
    assert "| 64, float16, training | dense | 2.00 | 3 | 4.00 | – | – | – | 2.10 |" in page
    assert "- kernels of dense: `gemm|a`" in page
    assert "- flash refuses 64, float16, training: head width" in page
    assert "| block | 1.00 | 0.50 | – | 2.00 | – | 1 | 2 | – |" in page
    assert "- skipped: late: 0 s were left" in page
    assert "- error: broken: RuntimeError: no" in page
    assert "| no block, 9 iterations, d | 45.5 | 55.7 | 61 |" in page
    assert "\n1 of 2 rows, 1.5 s." in page


# Kernels.


@pytest.mark.parametrize(
    ("backend", "path"), [("FLASH_ATTENTION", "flash"), ("MATH", "dense")], ids=str
)
def test_the_path_that_is_taken_is_seen(backend, path):
    attention = pytest.importorskip("torch.nn.attention")
    with attention.sdpa_kernel(attention.SDPBackend.__members__[backend]):
        row = measure_kernels(Call(16, 16, 64, "float32", "inference", "cpu"))
    assert row["taken"] == path and row["dense"] == (path == "dense")
    assert row["seconds"] > 0 and row["alone"]["dense"]["seconds"] > 0
    assert row["alone"]["cuDNN"]["refused"]


def test_tiles_are_seen_and_have_no_backends():
    row = measure_kernels(Call(16, 8, 64, "float32", "training", "cpu", masked=True))
    assert row["taken"] == "tiles" and not row["alone"] and not row["dense"]


@ON_GPU
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_dense_attention_on_a_gpu_is_seen_in_its_memory(mode):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    call = Call(64, 64, 4198, "float32", mode, "cuda")
    with sdpa_kernel(SDPBackend.MATH):
        dense = measure_kernels(call)
    assert dense["dense"] and dense["bytes_per_weight"] >= 4 and dense["kernels"]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        fused = measure_kernels(call)
    assert not fused["dense"] and fused["bytes_per_weight"] < 1


def test_paths_by_their_operators():
    for operator, path in (
        ("aten::_scaled_dot_product_flash_attention", "flash"),
        ("aten::_scaled_dot_product_efficient_attention", "memory-efficient"),
        ("aten::_scaled_dot_product_cudnn_attention", "cuDNN"),
        ("aten::_scaled_dot_product_attention_math", "dense"),
    ):
        assert path_of(["aten::scaled_dot_product_attention", operator, "aten::bmm"]) == path
    assert path_of(["aten::bmm"]) == "unknown"


def test_the_longest_kernels_of_the_gpu_alone():
    def event(name, microseconds, device=DeviceType.CUDA):
        elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=elapsed)

    short = [event(f"short{i}", 1 + i) for i in range(5)]
    twice = [event("twice", 6), event("twice", 6)]
    events = [event("aten::mm", 99, DeviceType.CPU), event("long", 10), *twice, *short]
    assert longest_kernels(events) == ["twice", "long", "short4", "short3"]


def test_a_refusal_is_the_first_reason_that_is_about_the_inputs():
    said = [
        "Memory efficient kernel not used because: (Triggered internally at /a/b.cpp:1.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at /a.)",
        "Flash attention kernel not used because: (Triggered internally at /a/b.cpp:2.)",
        "Expected dtype Half or BFloat16. (Triggered internally at /a/b.cpp:3.)",
    ]
    error = RuntimeError("No available kernel. Aborting execution.")
    assert refusal(said, error) == "Expected dtype Half or BFloat16."
    assert refusal([], error) == "RuntimeError: No available kernel"


# Exactness.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_a_tolerance_is_some_roundings(pairwise, dtype):
    """No block fails, and what is allowed is no more than some percent in half precision."""
    row = check_block(Check(pairwise, dtype, (24, 6, 9), "cpu", masked=True))
    assert row["passed"] and row["difference"] <= row["tolerance"]
    assert row["tolerance"] < 300 * torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_a_small_error_and_a_lost_key_are_seen_in_float32(monkeypatch, pairwise):
    check = Check(pairwise, "float32", (24, 6, 9), "cpu")
    with monkeypatch.context() as patch:
        break_attention(patch, ATTENTION[pairwise], lambda y: y * (1 + 1e-4))
        assert not check_block(check)["passed"]
    right = getattr(non_local, ATTENTION[pairwise])

    def without_last_key(theta, phi, g, mask, *scale):
        return right(theta, phi[..., :-1], g[..., :-1], mask, *scale)

    monkeypatch.setattr(non_local, ATTENTION[pairwise], without_last_key)
    assert not check_block(check)["passed"]


def test_a_wrong_gradient_alone_is_seen(monkeypatch):
    break_attention(monkeypatch, "softmax_attention", lambda y: y * 1.01 - y.detach() * 0.01)
    row = check_block(Check("embedded_gaussian", "float32", (24, 6, 9), "cpu"))
    assert not row["passed"] and row["tensor"].startswith("gradient of ")


def test_large_activations_are_compared_where_their_products_fit(monkeypatch):
    check = functools.partial(Check, "dot_product", "float16", (10, 7, 9), "cpu", magnitude=1e3)
    beyond, damped = (check_large_activations(check(damped=damped)) for damped in (False, True))
    assert beyond["passed"] and beyond["finite"] and not beyond["compared"]
    assert damped["passed"] and damped["compared"]
    break_attention(monkeypatch, "dot_product_attention", lambda y: y * torch.inf)
    assert not check_large_activations(check(damped=False))["passed"]


@ON_GPU
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_blocks_are_exact_on_a_gpu(pairwise, dtype):
    row = check_block(Check(pairwise, dtype, (24, 6, 9), "cuda", masked=True))
    assert row["passed"], row


# The training.

SHORT = [
    *("SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.STEPS", "()"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
]


@pytest.fixture
def short_lamps(tmp_path, monkeypatch):
    write_short_lamps(tmp_path, "lamps_long")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_lamps()
    yield
    monkeypatch.undo()
    register_lamps()


@pytest.mark.slow
def test_both_variants_are_trained_and_evaluated(short_lamps):
    result = training.train_far_task("cpu", time.monotonic() + 500, SHORT)
    assert result["dataset"] == "lamps_long_val" and result["iterations"] == 1
    assert list(result["variants"]) == ["no block", "embedded Gaussian"]
    for found in result["variants"].values():
        assert found.keys() == {"AP", "AP50", "seconds"} and found["seconds"] > 0


@pytest.mark.parametrize("command", ["exec sleep 600", "echo the last line; exit 4"])
def test_trainings_that_fail_or_last_too_long_leave_none_running(monkeypatch, short_lamps, command):
    started = []

    def start(config_file, options, folder):
        Path(folder).mkdir()
        script = command if "MODEL.NONLOCAL.POSITIONS" in options else "exec sleep 600"
        with open(Path(folder, "output.txt"), "wb") as log:
            started.append(subprocess.Popen(["sh", "-c", script], stdout=log))
        return started[-1]

    monkeypatch.setattr(training, "start_training", start)
    monkeypatch.setattr(training, "num_cores", lambda: 2)
    error, said = (RuntimeError, "embedded Gaussian ended with exit code 4: the last line")
    if command.startswith("exec"):
        error, said = TimeoutError, "did not end in time"
    deadline = time.monotonic() + (0.5 if error is TimeoutError else 60)
    with pytest.raises(error, match=said):
        training.train_far_task("cpu", deadline)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


# make gpu-report.


@pytest.mark.parametrize("has_gpu", [False, True])
def test_make_takes_the_python_that_has_a_gpu_or_else_that_of_the_setup(tmp_path, has_gpu):
    """Both are scripts here that write down how they were called."""
    calls = tmp_path / "calls"
    for name, code in (("python", 0 if has_gpu else 1), ("venv/bin/python", 0)):
        script = tmp_path / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(
            f'#!/bin/sh\ncase "$*" in *is_available*) exit {code};; esac\n'
            f'echo "{name} $*" >> "{calls}"\n'
        )
        script.chmod(0o755)
    given = [f"PYTHON={tmp_path / 'python'}", f"VENV={tmp_path / 'venv'}"]
    subprocess.run(["make", "gpu-report", *given], cwd=ROOT, check=True, capture_output=True)
    report = "-W ignore tools/benchmark.py --gpu-report"
    setup = f"python tools/bootstrap.py --venv {tmp_path / 'venv'}"
    expected = [f"python {report}"] if has_gpu else [setup, f"venv/bin/python {report}"]
    assert calls.read_text().splitlines() == expected
