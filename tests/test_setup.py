"""The setup: what it refuses, what it keeps, and the messages about missing parts."""

import ast
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"


def load(name, path):
    """A tool as a module: the tools are scripts, on no import path."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bootstrap():
    return load("bootstrap", "bootstrap.py")


@pytest.fixture
def installer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(TOOLS))
    module = load("install_detectron2", "install_detectron2.py")
    monkeypatch.setattr(module, "LOG", tmp_path / "install.log")
    return module


@pytest.fixture
def edits(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("detectron2_cdo.edits")


# The edits of detectron2 0.5's sources.


def test_edits_replace_what_they_name(edits, tmp_path):
    (tmp_path / "a.py").write_text("x = np.int(1)\ny = np.int(2)\nz = np.int64(3)\n")
    edits.apply_edits(
        tmp_path, [edits.Edit("a.py", "np.int(", "int(", 2), edits.Edit("a.py", "z =", "w =")]
    )
    assert (tmp_path / "a.py").read_text() == "x = int(1)\ny = int(2)\nw = np.int64(3)\n"


@pytest.mark.parametrize("text", ["nothing\n", "old, and once more old\n", None])
def test_edit_that_does_not_match_is_refused_and_nothing_written(edits, tmp_path, text):
    (tmp_path / "first.py").write_text("old\n")
    if text is not None:
        (tmp_path / "second.py").write_text(text)
    with pytest.raises(edits.EditError, match=r"second\.py"):
        edits.apply_edits(
            tmp_path, [edits.Edit("first.py", "old", "new"), edits.Edit("second.py", "old", "new")]
        )
    assert (tmp_path / "first.py").read_text() == "old\n"


# The installer.


def source_distribution(folder):
    """A made-up archive under the real one's name, whose setup.py leaves a trace when it runs."""
    setup = (
        f"from setuptools import setup\nopen({str(folder / 'ran')!r}, 'w')\n"
        "setup(name='detectron2-cdo', version='0.5')\n"
    )
    archive = folder / "detectron2-cdo-0.5.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("detectron2-cdo-0.5/setup.py")
        member.size = len(setup)
        tar.addfile(member, io.BytesIO(setup.encode()))
    return archive


@pytest.fixture
def offline_archive(monkeypatch, tmp_path):
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return source_distribution(folder)


def test_sources_with_another_hash_are_refused_before_their_code_runs(
    installer, offline_archive, tmp_path
):
    with pytest.raises(installer.InstallError, match="its log is"):
        installer.fetch(tmp_path)
    assert installer.SOURCES.split("sha256:")[1] in installer.LOG.read_text()
    assert not (offline_archive.parent / "ran").exists()


def test_sources_with_the_right_hash_are_fetched_and_edited_or_refused(
    installer, offline_archive, tmp_path
):
    right = hashlib.sha256(offline_archive.read_bytes()).hexdigest()
    tree = installer.unpack(installer.fetch(tmp_path, f"detectron2-cdo==0.5 --hash=sha256:{right}"))
    assert (tree / "setup.py").exists()
    with pytest.raises(installer.EditError, match="a file to edit"):
        installer.apply_edits(tree)


@pytest.mark.slow
def test_installer_keeps_the_detectron2_that_is_there():
    import detectron2

    done = subprocess.run(
        [sys.executable, str(TOOLS / "install_detectron2.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kept the installed one" in done.stdout
    assert f"detectron2 {detectron2.__version__}" in done.stdout


def test_installer_names_what_stands_in_the_way(installer, monkeypatch, tmp_path):
    reason = installer.obstacle(f"file://{tmp_path}/no-such-repository")
    assert "cannot be reached" in reason or "there " in reason
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in installer.obstacle("file:///nowhere")


def test_installer_takes_the_sources_when_compiling_fails(installer, monkeypatch, capsys):
    def pip(*arguments):
        if "--no-build-isolation" in arguments:
            raise installer.InstallError(f"pip {arguments[0]} failed; its log is {installer.LOG}")

    monkeypatch.setattr(installer, "pip", pip)
    monkeypatch.setattr(installer, "obstacle", lambda url: "")
    monkeypatch.setattr(installer, "install_sources", lambda: None)
    monkeypatch.setattr(installer, "present", lambda: "detectron2 0.5")
    installer.install()
    printed = capsys.readouterr().out
    assert f"not the official repository: pip install failed; its log is {installer.LOG}" in printed
    assert "took the Python sources" in printed and "deformable convolution" in printed


# The placeholder for the compiled operators.


@pytest.fixture
def placeholder():
    from detectron2 import _C

    if not _C.__file__.endswith(".py"):
        pytest.skip("this detectron2 has its compiled operators")
    return _C


def test_missing_operator_says_what_to_install(placeholder):
    import torch
    from detectron2.layers import nms_rotated
    from detectron2.layers.rotated_boxes import pairwise_iou_rotated

    sentence = "needs detectron2's compiled operators, which this installation .* lacks"
    with pytest.raises(RuntimeError, match=f"deform_conv_forward {sentence}"):
        placeholder.deform_conv_forward(torch.zeros(1))
    with pytest.raises(RuntimeError, match=f"box_iou_rotated {sentence}"):
        pairwise_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))
    with pytest.raises(RuntimeError, match=f"nms_rotated {sentence}"):
        nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)


def test_placeholder_has_each_operator_that_detectron2_calls(placeholder):
    package = Path(placeholder.__file__).parent
    used = set()
    for path in [*package.glob("layers/*.py"), *package.glob("evaluation/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used |= {node.attr} if node.value.id == "_C" else set()
    assert used == set(placeholder.OPERATORS)
    assert not hasattr(placeholder, "no_such_operator")


def test_environment_report_works_without_compiled_operators(placeholder):
    from detectron2.utils.collect_env import collect_env_info

    assert "Python sources only" in collect_env_info()


def test_missing_detectron2_is_one_clear_paragraph():
    code = "import sys; sys.modules['detectron2'] = None; import nonlocal_det"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: nonlocal_det needs detectron2")
    assert "python tools/install_detectron2.py" in last
    assert "git+https://github.com/facebookresearch/detectron2" in last


# The environment.


def test_old_python_is_told_which_one_is_needed(bootstrap):
    with pytest.raises(bootstrap.SetupError, match=r"Python 3\.9 or newer is needed.* is 3\.8"):
        bootstrap.require_python((3, 8))
    # It can say so only if the old Python parses the file at all.
    ast.parse((TOOLS / "bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_python_without_venv_is_told_what_to_install(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bootstrap.SetupError, match=r"no venv and no ensurepip.*python3\.11-venv"):
        bootstrap.require_python((3, 11))


@pytest.mark.parametrize("name", [".", "", "..", "tests", "nonlocal_det", "Makefile", "tools/.."])
def test_folder_of_the_project_is_no_place_for_an_environment(
    bootstrap, monkeypatch, capsys, tmp_path, name
):
    project = tmp_path / "project"
    for folder in ("tests", "nonlocal_det", "tools"):
        (project / folder).mkdir(parents=True)
        (project / folder / "a.py").touch()
    (project / "Makefile").touch()
    monkeypatch.setattr(bootstrap, "ROOT", project)
    monkeypatch.setattr(bootstrap, "set_up", lambda venv: pytest.fail(str(venv)))
    before = sorted(tmp_path.rglob("*"))
    for _ in ("without", "with an environment in it"):
        assert bootstrap.main(["--venv", name]) == 1
        assert "is no environment; name a new folder" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
        (project / "pyvenv.cfg").touch()
        before = sorted(tmp_path.rglob("*"))


def test_environments_and_new_folders_are_places_for_one(bootstrap, monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(bootstrap, "set_up", taken.append)
    for name, file in (("new", None), ("empty", ""), ("other", "pyvenv.cfg"), ("ours", None)):
        if file is not None:
            (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / file).touch()
        if name == "ours":
            (tmp_path / name).mkdir()
            bootstrap.write_stamp(tmp_path / name, "unfinished")
        assert bootstrap.main(["--venv", str(tmp_path / name)]) == 0
    assert taken == [tmp_path / name for name in ("new", "empty", "other", "ours")]


def test_half_made_environment_is_emptied_and_a_foreign_one_moved_aside(bootstrap, tmp_path):
    venv = tmp_path / "venv"
    (venv / "lib" / "torch").mkdir(parents=True)
    bootstrap.clear(venv)
    assert (tmp_path / "venv.1" / "lib" / "torch").is_dir()
    assert [entry.name for entry in venv.iterdir()] == [bootstrap.STAMP]
    (venv / "lib" / "torch").mkdir(parents=True)
    assert not bootstrap.is_finished(venv)
    bootstrap.clear(venv)
    assert [entry.name for entry in venv.iterdir()] == [bootstrap.STAMP]
    assert not (tmp_path / "venv.2").exists()


def test_environment_is_finished_only_with_its_own_inputs_and_parts(
    bootstrap, monkeypatch, tmp_path
):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(sys.executable)
    bootstrap.write_stamp(tmp_path, bootstrap.digest(tmp_path))
    monkeypatch.setattr(bootstrap, "FIND", "import json")
    assert bootstrap.is_finished(tmp_path)
    monkeypatch.setattr(bootstrap, "FIND", "import no_such_package")
    assert not bootstrap.is_finished(tmp_path)
    python.unlink()  # as when the system's Python was replaced
    assert not bootstrap.is_finished(tmp_path)
    bootstrap.write_stamp(tmp_path, bootstrap.digest(tmp_path / "moved"))
    assert not bootstrap.is_finished(tmp_path)


def test_of_two_setups_at_once_one_waits(bootstrap, monkeypatch, tmp_path):
    finished, made = [], []
    monkeypatch.setattr(bootstrap, "is_finished", lambda venv: bool(finished))

    def make(venv, lock):
        made.append(venv)
        assert len(made) == 1
        other = threading.Thread(target=bootstrap.set_up, args=(venv,))
        other.start()
        other.join(0.2)
        assert other.is_alive()  # waits for the lock
        finished.append(other)

    monkeypatch.setattr(bootstrap, "make", make)
    bootstrap.set_up(tmp_path / "venv")
    finished[0].join(10)
    assert not finished[0].is_alive() and len(made) == 1


def test_failed_step_shows_the_end_of_its_log(bootstrap, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        runner = bootstrap.Runner(tmp_path, lock.fileno())
        with pytest.raises(bootstrap.SetupError, match="(?s)status 3.*what went wrong.*setup.log"):
            runner.run([sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"])
