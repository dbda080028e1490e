"""Files of version 0.1.0 are still read: a run's checkpoint, records and config, and a dataset.

Mutations tried by hand; each makes at least one test here fail: a parameter of a block under
another name; a former mechanism that is refused; the dataset's stored parameters under another key.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.modeling import build_model
from tool_process import run_tool

from nonlocal_det.checkpoint.detection_checkpoint import NonLocalCheckpointer
from nonlocal_det.config import load_config
from nonlocal_det.data import LampsParams, ensure_dataset
from nonlocal_det.engine.run_info import read_run_info
from nonlocal_det.layers import CompactGeneralizedNonLocalBlock, WindowedNonLocalBlock

STORED = Path(__file__).parent / "data" / "v0.1.0"
SEED = 1937837772
PARAMS = {"side": (48, 80), "num_shapes": (1, 2), "shape_size": (16, 24), "lamp_size": (8, 10)}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored files, as the working directory."""
    copy = tmp_path / "v0.1.0"
    shutil.copytree(STORED, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("file", ["tiny.yaml", "run/config.yaml"])
def test_former_config_keys_and_values(file: str) -> None:
    """``grouped`` with GROUPS and WINDOW, the Taylor ORDER, and the former names of INIT."""
    with pytest.warns(FutureWarning):
        cfg = load_config(str(STORED / file))
        model = build_model(cfg)
    windowed = model.get_submodule("backbone.bottom_up.res4.nl4")
    assert isinstance(windowed, WindowedNonLocalBlock)
    assert (windowed.num_heads, windowed.window_size) == (2, 3)
    taylor = model.get_submodule("backbone.bottom_up.res3.nl0")
    assert isinstance(taylor, CompactGeneralizedNonLocalBlock)
    # The constant, linear and quadratic terms of the Gaussian.
    assert taylor.groups == 2 and len(taylor.coefficients) == 3 and all(taylor.coefficients)


def test_a_checkpoint_holds_every_weight_of_todays_model() -> None:
    model = build_model(load_config(str(STORED / "run" / "config.yaml")))
    NonLocalCheckpointer(model).load(str(STORED / "run" / "model_final.pth"))
    stored = torch.load(STORED / "run" / "model_final.pth", weights_only=True)["model"]
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(stored[name], value) for name, value in state.items())


def test_the_record_of_a_run() -> None:
    (start,) = read_run_info(str(STORED / "run"))
    assert start["seed"] == SEED and start["git"]["nonlocal_det"]["commit"].startswith("fa600a0")


def test_a_dataset_is_accepted_and_left_as_it_is(folder: Path) -> None:
    def files() -> dict[Path, tuple[bytes, int]]:
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("lamps/**/*.*")}

    before = files()
    assert len(before) == 2 + 4 + 2
    ensure_dataset("lamps", {"train": 4, "val": 2}, params=LampsParams(**PARAMS))
    assert files() == before
    with pytest.raises(FileExistsError):
        ensure_dataset("lamps", {"train": 4, "val": 2}, seed=1, params=LampsParams(**PARAMS))


@pytest.mark.slow
def test_a_run_resumes(folder: Path) -> None:
    """With its seed, its optimizer and its records, from iteration 4 to 6."""
    (start,) = read_run_info("run")
    if detectron2.__version__ != start["versions"]["detectron2"]:
        pytest.skip("detectron2 groups an optimizer's parameters otherwise in other versions.")
    arguments = ["--resume", "--config-file", "run/config.yaml"]
    for split in ("train", "val"):
        arguments += [f"--{split}-json", f"lamps/annotations/instances_{split}.json"]
        arguments += [f"--{split}-images", f"lamps/{split}"]
    arguments += ["SOLVER.MAX_ITER", "6", "OUTPUT_DIR", "run"]
    done = run_tool("train_net", *arguments)
    assert "Starting training from iteration 4" in done.stdout + done.stderr

    before = torch.load(STORED / "run" / "model_final.pth", weights_only=True)
    after = torch.load(folder / "run" / "model_final.pth", weights_only=True)
    assert (before["iteration"], after["iteration"]) == (3, 5)
    assert any(not torch.equal(after["model"][n], v) for n, v in before["model"].items())
    starts = read_run_info("run")
    assert [start["resume"] for start in starts] == [False, True]
    assert [start["seed"] for start in starts] == [SEED, SEED]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.json").read_text().splitlines()]
    assert rows[0] == json.loads((STORED / "run" / "metrics.json").read_text().splitlines()[0])
    assert rows[-1]["iteration"] == 6 and "bbox/AP" in rows[-1]
