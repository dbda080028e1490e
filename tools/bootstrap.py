#!/usr/bin/env python3
"""Make the project's own environment, a virtual one in the project folder: ``make setup``.

    python3 tools/bootstrap.py [--venv .venv]

Needs a bare Python 3.9 with its standard library, no more. A finished environment is left alone;
one whose making was interrupted, or whose inputs have changed, is made again. Everything is kept in
the project folder, except pip's own cache.

This file keeps to the syntax of Python 3.6, so that an older Python can still say that it is one.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, Optional

OLDEST_PYTHON = (3, 9)
ROOT = Path(__file__).resolve().parents[1]
# A finished environment is a function of these files, and of where it lies. Of the project itself,
# which is installed in editable form, that is its metadata: they name the command that is made.
INPUTS = (
    "pyproject.toml",
    "requirements.txt",
    "tools/bootstrap.py",
    "tools/install_detectron2.py",
    "tools/detectron2_cdo/edits.py",
    "tools/detectron2_cdo/_C.py",
)
# Lies in the environment: marks it as ours from the start, holds the digest of INPUTS at the end.
STAMP = "nonlocal_det.stamp"
HEARTBEAT_S = 30
# What must at least be found in an environment that is passed as finished; finds, does not import.
FIND = (
    "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, "
    "('pip', 'torch', 'torchvision', 'cv2', 'detectron2', 'nonlocal_det', 'ruff', 'pytest'))))"
)
# What must really import in the end: extension modules fail only then.
IMPORT = "import cv2, torchvision.ops, pycocotools.mask, detectron2.layers, detectron2.model_zoo"


class SetupError(Exception):
    """The setup failed; the message says why and what to do."""


def main(argv: Optional[list] = None) -> int:
    """Set up; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the project's environment.")
    parser.add_argument("--venv", default=".venv", help="its folder (default: .venv)")
    venv = Path(os.path.abspath(str(ROOT / parser.parse_args(argv).venv)))
    try:
        require_python(sys.version_info[:2])
        require_place(venv)
        set_up(venv)
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next run starts it again", file=sys.stderr)
        return 130
    return 0


def require_python(version: tuple) -> None:
    """Refuse a Python that is too old, or that cannot make virtual environments."""
    if version < OLDEST_PYTHON:
        raise SetupError(
            "Python {}.{} or newer is needed, and {} is {}.{}; name another one: "
            "make setup PYTHON=python3.11".format(*OLDEST_PYTHON, sys.executable, *version)
        )
    # Debian and Ubuntu keep both in a package of their own.
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            "{} has no {}, which makes virtual environments; on Debian and Ubuntu the package "
            "python{}.{}-venv brings it".format(sys.executable, " and no ".join(missing), *version)
        )


def require_place(venv: Path) -> None:
    """Refuse a folder that is, or may be, anything but an environment: it would be moved aside."""
    if not venv.exists() or (venv / STAMP).exists():
        return
    is_environment = (venv / "pyvenv.cfg").is_file() or (venv.is_dir() and not any(venv.iterdir()))
    if not is_environment or venv == ROOT or venv in ROOT.parents:
        raise SetupError(
            f"{venv} exists and is no environment; name a new folder: make setup VENV=.venv"
        )


def set_up(venv: Path) -> None:
    """Make the environment unless it is finished; a second setup waits for the first."""
    if is_finished(venv):
        return
    venv.parent.mkdir(parents=True, exist_ok=True)
    with locked(venv.with_name(venv.name + ".lock")) as lock:
        if not is_finished(venv):
            make(venv, lock)


def is_finished(venv: Path) -> bool:
    """Whether the environment was finished, from today's inputs, and still seems complete."""
    stamp = venv / STAMP
    if not stamp.is_file() or stamp.read_text() != digest(venv):
        return False
    # Not from the project folder, where its package is found even if it is not installed.
    command = [str(python(venv)), "-c", FIND]
    with contextlib.suppress(OSError):  # the Python that the environment was made with may be gone
        return subprocess.call(command, env=clean_environ(), cwd=str(venv)) == 0
    return False


def digest(venv: Path) -> str:
    """The inputs as one number; scripts in the environment hold its path, so that counts too."""
    parts = [str(ROOT).encode(), str(venv).encode()]
    parts += [(ROOT / name).read_bytes() for name in INPUTS]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the lock on ``path``; gives its file descriptor."""
    try:
        import fcntl
    except ImportError:
        raise SetupError("this setup needs Linux or macOS") from None
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another setup is running here; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def make(venv: Path, lock: int) -> None:
    """Make the environment from nothing, stamp last."""
    clear(venv)
    runner = Runner(venv, lock)
    # Python compiles what it imports; to compile all of torch and sympy takes far longer.
    pip = [str(python(venv)), "-m", "pip", "install", "--no-compile"]
    version = "{}.{}.{}".format(*sys.version_info)
    runner.step(f"1/4 Python {version} environment in {venv.name}")
    runner.run([sys.executable, "-m", "venv", str(venv)])
    runner.step("2/4 the packages of requirements.txt (torch alone is some 3 GB to fetch)")
    runner.run([*pip, "pip>=23"])  # an older one cannot install the project in editable form
    runner.run([*pip, "-r", str(ROOT / "requirements.txt")])
    runner.step("3/4 detectron2")
    runner.run([str(python(venv)), str(ROOT / "tools/install_detectron2.py")], show=True)
    runner.step("4/4 the project itself")
    runner.run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    runner.run([str(python(venv)), "-c", IMPORT])
    shutil.rmtree(str(runner.temporary), ignore_errors=True)
    write_stamp(venv, digest(venv))
    runner.step("ready")


def clear(venv: Path) -> None:
    """Empty the folder and put our mark there, whatever an earlier setup left in it.

    An environment without the mark is somebody else's: it is moved aside, not removed.
    """
    if venv.exists() and not (venv / STAMP).exists() and any(venv.iterdir()):
        names = (f"{venv.name}.{number}" for number in itertools.count(1))
        aside = next(path for path in map(venv.with_name, names) if not path.exists())
        venv.rename(aside)
        say(f"{venv.name} was not made by this setup; it is {aside.name} now")
    venv.mkdir(exist_ok=True)
    write_stamp(venv, "unfinished")
    for entry in venv.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(str(entry))
        elif entry.name != STAMP:
            entry.unlink()


def write_stamp(venv: Path, text: str) -> None:
    """Replace the stamp in one step: a kill leaves the old one or the new one."""
    new = venv / (STAMP + ".new")
    new.write_text(text)
    os.replace(str(new), str(venv / STAMP))


class Runner:
    """Runs the commands of a setup: output to a log, one line per step, errors with its end."""

    def __init__(self, venv: Path, lock: int) -> None:
        self.log = venv / "setup.log"
        self.temporary = venv / "tmp"
        self.started = time.monotonic()
        self.environ = clean_environ()
        # pip unpacks gigabytes there, more than some machines' /tmp holds.
        self.temporary.mkdir()
        self.environ["TMPDIR"] = str(self.temporary)
        self.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        self.environ["PIP_PROGRESS_BAR"] = "off"  # in a log it is one endless line
        # Children hold the lock too: one that outlives us must end before another setup starts.
        os.set_inheritable(lock, True)

    def step(self, title: str) -> None:
        """Say what comes now, and when."""
        say(f"{time.monotonic() - self.started:4.0f} s  {title}")

    def run(self, command: list, show: bool = False) -> None:
        """Run one command to its end; ``show`` lets its output through instead of logging it."""
        with self.log.open("ab") as log:
            log.write("$ {}\n".format(" ".join(command)).encode())
            log.flush()
            child = subprocess.Popen(
                command,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=None if show else log,
                stderr=None if show else subprocess.STDOUT,
                close_fds=False,
            )
            status = self._wait(child, quiet=show)
        if status != 0:
            raise SetupError(
                "this failed with status {}: {}\n{}\nThe full log: {}".format(
                    status, " ".join(command), "" if show else tail(self.log), self.log
                )
            )

    def _wait(self, child: subprocess.Popen, quiet: bool) -> int:
        while True:
            try:
                return child.wait(HEARTBEAT_S)
            except subprocess.TimeoutExpired:
                if not quiet:
                    self.step(f"    ... {news(self.log)}")


def clean_environ() -> dict:
    """The environment without what would let another Python's packages in."""
    drop = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    return {name: value for name, value in os.environ.items() if name not in drop}


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])


def news(log: Path) -> str:
    """What pip is at, in one short line: its details are indented."""
    lines = [line for line in tail(log, 100).splitlines() if line[:1].strip()]
    return next((line[:70] for line in reversed(lines) if not line.startswith("WARNING")), "")


def python(venv: Path) -> Path:
    """The environment's interpreter."""
    return venv / "bin" / "python"


def say(line: str) -> None:
    """One line of progress, at once."""
    print("setup: " + line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
