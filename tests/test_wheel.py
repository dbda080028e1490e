"""The wheel, in an environment of its own and away from the checkout: its files and its command.

Mutations tried by hand; each makes at least one test here fail: a wheel without the configurations,
without the explorer page, or without the command; a command that needs the checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import detectron2
import pytest
import torch

from nonlocal_det.data import LampsParams, write_dataset
from nonlocal_det.model_zoo import zoo_names

ROOT = Path(__file__).resolve().parents[1]
PARAMS = LampsParams(side=(48, 80), num_shapes=(1, 2), shape_size=(16, 24), lamp_size=(8, 10))
CONFIG = "lamps_mask_rcnn_R18_NL"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

pytestmark = pytest.mark.slow


def run(*command: Any, cwd: Path) -> str:
    """Run a command outside of the checkout; return its output."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ["DETECTRON2_DATASETS"] = str(cwd)
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)}\n{output[-4000:]}"
    return output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the sources because building writes into them."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    for name in ("nonlocal_det", "configs"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sources, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset, and with the wheel in ``venv``.

    The environment sees torch and detectron2 of the running one by a .pth file, which does not
    process the .pth files there: an editable install of the checkout stays out.
    """
    folder = tmp_path_factory.mktemp("user")
    write_dataset(str(folder / "data"), "train", 4, params=PARAMS)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    install = ("--python", python, "install", "--no-deps", "--no-index", wheel)
    run(*PIP, *install, cwd=folder)
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    shared = {str(Path(module.__file__).parents[1]) for module in (torch, detectron2)}
    shared |= {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site_packages / "shared.pth").write_text("\n".join(shared))
    return folder


@pytest.fixture
def command(folder: Path):
    """Run ``nonlocal-det`` of the wheel's environment; return its output."""

    def call(*arguments: Any) -> str:
        return run(folder / "venv" / "bin" / "nonlocal-det", *arguments, cwd=folder)

    return call


def test_the_wheel_holds_what_a_user_needs(folder: Path) -> None:
    code = """if True:
        import json, os, nonlocal_det
        from nonlocal_det import attention, model_zoo
        page = os.path.join(os.path.dirname(attention.__file__), "figures", "explorer.html")
        config = model_zoo.get_config("mask_rcnn_R50_NL").MODEL.NONLOCAL.POSITIONS
        lazy = model_zoo.get_config("lazy/mask_rcnn_R101_NL").model.backbone.bottom_up.positions
        names = model_zoo.zoo_names()
        found = [nonlocal_det.__file__, os.path.isfile(page), list(config), list(lazy), names]
        print(json.dumps(found))
    """
    python = folder / "venv" / "bin" / "python"
    last = run(python, "-W", "ignore", "-c", code, cwd=folder).splitlines()[-1]
    package, page, config, lazy, names = json.loads(last)
    assert Path(package).is_relative_to(folder / "venv")
    assert page and config == lazy == ["res4[-2]"] and names == zoo_names()


def test_the_metadata_name_the_license_and_the_readme(folder: Path) -> None:
    (metadata,) = (folder / "venv" / "lib").glob("python*/site-packages/nonlocal_det-*/METADATA")
    text = metadata.read_text()
    for line in ("Name: nonlocal-det", "License-Expression: Apache-2.0", "License-File: LICENSE"):
        assert f"{line}\n" in text
    assert (ROOT / "README.md").read_text() in text
    assert "Apache License" in (metadata.parent / "licenses" / "LICENSE").read_text()


def test_the_command_lists_its_commands(command) -> None:
    assert "check-data" in command("--help")


def test_data_training_and_attention(command, folder: Path) -> None:
    """Check a dataset, train on it for 5 iterations, and visualize the model's attention."""
    data = ("--train-json", "data/annotations/instances_train.json", "--train-images", "data/train")
    assert "can be used" in command("check-data", "--config-file", CONFIG, *data)

    options = ("SOLVER.MAX_ITER", 5, "SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TRAIN", "(64,)")
    command("train", "--config-file", CONFIG, *data, *options, "OUTPUT_DIR", "run")
    rows = (folder / "run" / "metrics.json").read_text().splitlines()
    assert json.loads(rows[-1])["iteration"] == 4

    model = ("--config-file", CONFIG, "--weights", "run/model_final.pth")
    image = "data/train/000001.png"
    command("visualize", *model, "--point", "20,20", "--output", "figures", "--input", image)
    assert list((folder / "figures").glob("000001*"))
