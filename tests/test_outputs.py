"""Every command leaves the files that it did not write as they are.

Mutations tried by hand; each makes at least one test here fail: a check left out, for any command;
an earlier output that was changed taken for one; a name that is that of an input; files that appear
meanwhile overwritten; a list shared by commands.
"""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from nonlocal_det.attention.figures.image_io import read_video
from nonlocal_det.attention.figures.output_names import free_output_stems
from nonlocal_det.cli import (
    ablate,
    analyze,
    benchmark,
    export,
    lazy_train,
    measure_attention,
    train,
    visualize,
)
from nonlocal_det.config import load_config
from nonlocal_det.data.lamps.writer import annotation_file, image_root, write_dataset
from nonlocal_det.engine.output_dir import LOCK_FILE, check_run_folder
from nonlocal_det.utils.outputs import HIDDEN_FOLDER, CommandOutputs

CONFIG = Path(__file__).parents[1] / "configs" / "lamps_mask_rcnn_R18_NL.yaml"


@pytest.fixture(scope="module")
def lamps(tmp_path_factory) -> str:
    """Register a dataset of one image and return its name."""
    folder, name = str(tmp_path_factory.mktemp("lamps")), "outputs_test_lamps"
    write_dataset(folder, "val", 1)
    register_coco_instances(name, {}, annotation_file(folder, "val"), image_root(folder, "val"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def inputs(tmp_path) -> Path:
    """A folder with an image, a video, a config and a suite."""
    image = np.full((40, 60, 3), (220, 20, 30), np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    writer = cv2.VideoWriter(
        str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (60, 40)
    )
    for _ in range(3):
        writer.write(image)
    writer.release()
    (tmp_path / "config.yaml").write_text(f"_BASE_: {CONFIG}\n")
    suite = {
        "config": "config.yaml",
        "seeds": [1],
        "baseline": "stock",
        "tasks": {"task": {"DATASETS.TRAIN": ["outputs_test_lamps"], "DATASETS.TEST": []}},
        "variants": {"stock": {"MODEL.WEIGHTS": "missing.pth"}},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of each file below a folder, by relative path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_kept(file: Path, said: str, run) -> None:
    """A command refuses to write over a file of the user's, and leaves its folder as it is."""
    file.write_text("_BASE_: of the user")
    before = contents(file.parent)
    with pytest.raises(SystemExit, match=said):
        run()
    assert contents(file.parent) == before
    file.unlink()


MODEL = ["--config-file", "config.yaml", "--output", "."]
SMALL = ["MODEL.NONLOCAL.POSITIONS", "('res4[-2]',)"]
# Command, its arguments in the folder of its inputs, and the files that it writes there.
COMMANDS = {
    "measure-attention": (
        measure_attention,
        [*MODEL, "--num-queries", "2", "--dataset", "outputs_test_lamps", *SMALL],
        ["attention.csv", "attention.png"],
    ),
    "analyze": (
        analyze,
        ["--config-file", "config.yaml", "--size", "64", "64", "--output-json", "counts.json"],
        ["counts.json"],
    ),
    "benchmark": (
        benchmark,
        ["--shape", "4x3x3", "--pairwise", "gaussian", "--mode", "inference", "--repeats", "1"]
        + ["--skip-dense", "--output", "."],
        ["benchmark.json", "benchmark.png"],
    ),
    "export": (export, [*MODEL, "--sample-image", "photo.png", *SMALL], ["model.ts"]),
    "ablate": (
        ablate,
        ["--suite", "suite.yaml", "--output", "."],
        ["report.json", "tables.md", "distance.png"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_files_of_the_names_of_outputs_are_kept(name, inputs, lamps, monkeypatch):
    command, arguments, outputs = COMMANDS[name]
    monkeypatch.chdir(inputs)
    for output in outputs:
        said = f"{output}' exists and is not an earlier output"
        assert_kept(inputs / output, said, lambda: command.main(arguments))


@pytest.mark.parametrize(
    "name, runs",
    [
        ("measure-attention", 2),
        pytest.param("analyze", 1, marks=pytest.mark.slow),
        pytest.param("export", 1, marks=pytest.mark.slow),
    ],
)
def test_commands_write_their_outputs_alone(name, runs, inputs, lamps, monkeypatch):
    """Also over their own earlier outputs, until somebody changes these."""
    command, arguments, outputs = COMMANDS[name]
    monkeypatch.chdir(inputs)
    before = contents(inputs)
    for _ in range(runs):
        assert command.main(arguments) == 0
        after = contents(inputs)
        assert {path: after[path] for path in before} == before
        assert after.keys() - before == {*outputs, f"{HIDDEN_FOLDER}/{name}.sha256"}
    with open(inputs / outputs[-1], "ab") as file:
        file.write(b"changed")
    before = contents(inputs)
    with pytest.raises(SystemExit, match="is not an earlier output"):
        command.main(arguments)
    assert contents(inputs) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_no_input_is_an_output(name, inputs, lamps, monkeypatch):
    """Any output that has the name of the config, of an image or of the suite."""
    command, arguments, outputs = COMMANDS[name]
    monkeypatch.chdir(inputs)
    names = ["photo.png", "config.yaml", "suite.yaml"]
    for output in outputs:
        for given in filter(arguments.__contains__, names):
            (inputs / output).write_bytes((inputs / given).read_bytes())
            replaced = [output if argument == given else argument for argument in arguments]
            before = contents(inputs)
            with pytest.raises(SystemExit, match="is not an earlier output"):
                command.main(replaced)
            assert contents(inputs) == before
            (inputs / output).unlink()


def test_visualize_draws_beside_its_inputs(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    Image.open("photo.png").save("other.jpg")
    Image.new("RGB", (8, 8)).save("other.png")
    before = contents(inputs)
    drawing = ["--confidence-threshold", "1.1", *MODEL, *SMALL]
    for _ in range(2):  # the second run replaces the outputs of the first, and draws none of them
        assert visualize.main(["--input", ".", *drawing]) == 0
        after = contents(inputs)
        assert {path: after[path] for path in before} == before
        new = ["clip-2.mp4", "other-2.png", "other-3.png", "photo-2.png"]
        assert after.keys() - before == {*new, f"{HIDDEN_FOLDER}/visualize.sha256"}
        assert capsys.readouterr().out.split() == [f"./{name}" for name in new]
    frames, _ = read_video("clip-2.mp4")
    assert len(list(frames)) == 3
    # A file that was drawn, or changed, is the user's.
    (inputs / "photo-2.png").write_text("of the user")
    assert visualize.main(["--input", "photo.png", "other-2.png", *drawing]) == 0
    assert (inputs / "photo-2.png").read_text() == "of the user"
    assert (inputs / "other-2.png").read_bytes() == after["other-2.png"]
    assert capsys.readouterr().out.split() == ["./photo-3.png", "./other-2-2.png"]


def test_all_outputs_of_an_input_share_a_free_name(tmp_path):
    (tmp_path / "a.html").write_text("of the user")
    (tmp_path / "b.mp4").write_text("of the user")

    def stems(*inputs, **options):
        return free_output_stems(inputs, str(tmp_path), CommandOutputs("visualize"), **options)

    assert stems("in/a.jpg", "in/b.jpg", "other/a.jpg", html=True) == ["a-2", "b", "a-3"]
    assert stems("in/a.jpg", "in/a.avi", "in/b.avi") == ["a", "a-2", "b-2"]
    # An input in the output folder keeps its name, also if it does not exist, or by a link.
    (tmp_path / "link").symlink_to(tmp_path)
    assert stems(str(tmp_path / "link" / "c.pdf"), formats=["png", "pdf"]) == ["c-2"]


# ---- output folders of runs

SETTINGS = ["SOLVER.MAX_ITER", "1", "OUTPUT_DIR", "."]
RUNS = {
    "train": (train, ["--config-file", "given.yaml", *SETTINGS]),
    "evaluate": (train, ["--config-file", "given.yaml", "--eval-only", *SETTINGS]),
    "lazy-train": (lazy_train, ["--config-file", "lazy/mask_rcnn_R50_NL.py", "train.output_dir=."]),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_keep_files_of_no_run(name, lamps, tmp_path, monkeypatch, capsys):
    command, arguments = RUNS[name]
    monkeypatch.chdir(tmp_path)
    datasets = f"DATASETS: {{TRAIN: [{lamps}], TEST: [{lamps}]}}"
    (tmp_path / "given.yaml").write_text(f"_BASE_: {CONFIG}\n{datasets}\n")
    names = ["config.yaml", "log.txt"]
    if name != "evaluate":
        names += ["metrics.json", "model_final.pth"]
    for file in names:
        said = f"{file}' would be overwritten, and '.' is not the"
        assert_kept(tmp_path / file, said, lambda: command.main(arguments))


def test_folders_of_runs_are_known_by_their_configs_or_locks(tmp_path):
    folder = str(tmp_path)
    (tmp_path / "config.yaml").touch()  # left by a run that was killed as it began
    check_run_folder(folder)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "model_final.pth").write_text("of the user")
    (tmp_path / "log.txt").write_text("of the user")
    with pytest.raises(FileExistsError, match="log.txt"):
        check_run_folder(folder, eval_only=True)
    check_run_folder(folder, resume=True)  # its config may not have been copied
    cfg = load_config(str(CONFIG))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    check_run_folder(folder)
    (tmp_path / "config.yaml").write_text("SOLVER: {}\nINPUT: {}\nVERSION: 2\n")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="config.yaml"):
            check_run_folder(folder, resume=resume)
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(FileExistsError, match="config.yaml"):
        check_run_folder(folder)
    (tmp_path / LOCK_FILE).touch()
    check_run_folder(folder)


# ---- output files themselves


def test_outputs_of_one_command_are_not_anothers(tmp_path):
    with CommandOutputs("one").drafts(str(tmp_path)) as drafts:
        Path(drafts, "a.txt").write_text("a")
    path = str(tmp_path / "a.txt")
    assert CommandOutputs("one").is_earlier_output(path) and CommandOutputs("one").may_write(path)
    assert not CommandOutputs("other").may_write(path)
    assert CommandOutputs("other").may_write(str(tmp_path / "b.txt"))


def test_drafts_of_a_failed_command_leave_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), CommandOutputs("one").drafts(str(tmp_path)) as drafts:
        Path(drafts, "a.txt").write_text("a")
        raise ZeroDivisionError
    assert contents(tmp_path) == {}
    assert os.listdir(tmp_path / HIDDEN_FOLDER) == []


def test_files_that_appear_meanwhile_are_kept(tmp_path):
    outputs = CommandOutputs("one")
    with pytest.raises(FileExistsError, match="b.txt"), outputs.drafts(str(tmp_path)) as drafts:
        for name in ("a.txt", "b.txt"):
            Path(drafts, name).write_text("a")
        (tmp_path / "b.txt").write_text("of the user")
    assert contents(tmp_path) == {"b.txt": b"of the user"}


@pytest.mark.parametrize("kind", ["link", "broken link", "folder"])
def test_links_and_folders_are_not_outputs(kind, tmp_path):
    (tmp_path / "file").write_text("of the user")
    path = tmp_path / "a.txt"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / ("file" if kind == "link" else "no file"))
    with pytest.raises(FileExistsError):
        CommandOutputs("one").check(str(path))
