#!/usr/bin/env python
"""Install detectron2 into the environment of the Python that runs this.

    python tools/install_detectron2.py

One that is already there is kept. Otherwise the official repository is compiled against the
installed torch. Where that cannot be done, because GitHub cannot be reached or nothing can be
compiled, the Python sources of detectron2 0.5 that PyPI has are installed instead, with the edits
of ``detectron2_cdo/edits.py`` and a placeholder for the compiled operators.

``DETECTRON2_GIT`` names another git URL of the official repository, say a mirror of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from detectron2_cdo.edits import EditError, apply_edits

OFFICIAL = "https://github.com/facebookresearch/detectron2"
SOURCES = (
    "detectron2-cdo==0.5 "
    "--hash=sha256:53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
)
PLACEHOLDER = Path(__file__).parent / "detectron2_cdo" / "_C.py"
# In the environment, which lasts; a system's own may be closed to its user.
LOG_FOLDER = sys.prefix if os.access(sys.prefix, os.W_OK) else tempfile.gettempdir()
LOG = Path(LOG_FOLDER) / "detectron2-install.log"
ANSWER_S = 10

LACKS = f"""\
It is detectron2 0.5 without its compiled operators. What it lacks raises an error that says so:
  - rotated boxes: their IoU and NMS, ROIAlignRotated, RRPN, RROIHeads, RotatedCOCOEvaluator
  - deformable convolution, except DeformConv's forward pass on a CPU
  - the compiled COCO evaluation; pycocotools' own takes its place, with the same numbers
  - Caffe2 export, and what came after 0.5: ViT, MViT and Swin backbones, FCOS, trackers, LN
Axis-aligned box, mask and keypoint detectors have all they need. For all of detectron2:
  python -m pip uninstall detectron2-cdo
  python -m pip install --no-build-isolation git+{OFFICIAL}"""

# Describes the installed detectron2, or exits with 3. Compiled operators fail to load only when
# detectron2.layers is imported, for example after torch was replaced.
PROBE = """
import importlib.util, sys
if importlib.util.find_spec("detectron2") is None:
    sys.exit(3)
import detectron2, detectron2.layers
kind = "Python sources only" if detectron2._C.__file__.endswith(".py") else "compiled"
print(f"detectron2 {detectron2.__version__} ({kind}) in {detectron2.__path__[0]}")
"""


class InstallError(Exception):
    """detectron2 cannot be installed; the message says why."""


def main() -> int:
    """Install detectron2 unless it is there; returns the exit status."""
    try:
        found = present()
        if found:
            say(f"kept the installed one: {found}")
            return 0
        require_torch()
        install()
    except (InstallError, EditError) as error:
        print(f"detectron2: error: {error}", file=sys.stderr)
        return 1
    return 0


def present() -> str:
    """Describe the detectron2 of this environment; empty if there is none."""
    probe = run_python("-c", PROBE)
    if probe.returncode == 3:
        return ""
    if probe.returncode != 0:
        raise InstallError(
            f"it is installed here but does not import: {last_line(probe.stderr)}\nRemove it and "
            "run this again: python -m pip uninstall detectron2 detectron2-cdo"
        )
    return probe.stdout.strip()


def require_torch() -> None:
    """Require torch and torchvision, which detectron2 is built against."""
    probe = run_python("-c", "import torch, torchvision.ops")
    if probe.returncode != 0:
        raise InstallError(f"install torch and torchvision first: {last_line(probe.stderr)}")


def install() -> None:
    """Install the official one, or else the sources from PyPI, and say which and why."""
    url = os.environ.get("DETECTRON2_GIT", OFFICIAL)
    reason = obstacle(url)
    if not reason:
        say(f"compiling {url} against the installed torch; this takes a minute or more")
        reason = install_official(url)
    if not reason:
        say(f"took the official repository: {present()}")
        return
    say(f"not the official repository: {reason}")
    install_sources()
    say(f"took the Python sources on PyPI (detectron2-cdo 0.5): {present()}")
    print(LACKS, flush=True)


def obstacle(url: str) -> str:
    """Why the official repository cannot be compiled here; empty if it seems that it can."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"there are no Python headers in {headers}"
    if shutil.which("git") is None:
        return "there is no git"
    return unreachable(url)


def unreachable(url: str) -> str:
    """Why ``url`` does not answer git; empty if it does."""
    environ = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # a missing one asks for a password
    try:
        subprocess.run(
            ["git", "ls-remote", url, "HEAD"],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return f"{url} did not answer within {ANSWER_S} s"
    except subprocess.CalledProcessError as error:
        return f"{url} cannot be reached ({last_line(error.stderr)})"
    return ""


def install_official(url: str) -> str:
    """Compile and install ``url``; returns what went wrong, or nothing."""
    # Its model zoo imports pkg_resources, which later setuptools lack.
    try:
        pip("install", "setuptools<81", "wheel")
        pip("install", "--no-build-isolation", f"git+{url}")
    except InstallError as error:
        return str(error)
    try:
        present()
    except InstallError as error:
        pip("uninstall", "--yes", "detectron2")
        return f"the compiled package does not import: {error}"
    return ""


def install_sources() -> None:
    """Fetch, edit and install the Python sources that PyPI has."""
    pip("install", "setuptools", "wheel")
    with tempfile.TemporaryDirectory() as folder:
        tree = unpack(fetch(Path(folder)))
        apply_edits(tree)
        shutil.copy(PLACEHOLDER, tree / "detectron2" / "_C.py")
        pip("install", "--no-build-isolation", str(tree))


def fetch(folder: Path, requirement: str = SOURCES) -> Path:
    """Fetch the source distribution, refused by pip before use if its hash is another one."""
    wanted = folder / "requirement.txt"
    wanted.write_text(requirement)
    # Without isolation, for pip runs the original setup.py, which imports torch.
    arguments = ("--no-deps", "--no-build-isolation", "--no-binary=:all:", "--require-hashes")
    pip("download", *arguments, "--dest", str(folder), "--requirement", str(wanted))
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path) -> Path:
    """Unpack a source distribution beside itself; returns its one folder."""
    shutil.unpack_archive(archive, archive.parent)
    return archive.with_name(archive.name[: -len(".tar.gz")])


def pip(*arguments: str) -> None:
    """Run pip for this environment, its output to the log."""
    command = [sys.executable, "-m", "pip", *arguments]
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    if done.returncode != 0:
        raise InstallError(f"pip {arguments[0]} failed; its log is {LOG}")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python away from the current folder, which may hold a checkout of detectron2."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=sys.prefix, capture_output=True, text=True)


def last_line(text: str) -> str:
    """The last line of an error's output."""
    return (text.strip().splitlines() or ["no message"])[-1]


def say(line: str) -> None:
    """One line of progress, at once."""
    print(f"detectron2: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
