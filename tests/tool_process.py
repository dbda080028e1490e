"""Runs of the tools in processes that start in a fraction of a second.

A server process imports torch once and forks. Each run is then a process of its own, with its own
files, environment, signals, limits and exit code; the script, detectron2 and this project are read
anew in it. What starts Python itself is tested by `subprocess`, once for every tool.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Optional

HANG = 600  # seconds without an end
ROOT = Path(__file__).resolve().parents[1]

servers = multiprocessing.get_context("forkserver")
# Libraries that read neither the environment nor the current folder, slowest first. They start no
# thread, which a fork would lose.
servers.set_forkserver_preload(
    [
        *("torch", "torchvision", "matplotlib.pyplot", "torch.utils.tensorboard", "omegaconf"),
        *("torch.distributed.run", "hydra", "fvcore.nn", "cv2", "pycocotools.cocoeval"),
    ]
)


def run_tool(name: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``tools/NAME.py`` to its end; see `run_script`."""
    return run_script(ROOT / "tools" / f"{name}.py", *arguments, **options)


def run_script(
    script: Path,
    *arguments: Any,
    fails: bool = False,
    cwd: Optional[Path] = None,
    env: Optional[Mapping[str, str]] = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, and check that it fails or does not.

    Args:
        script: The file.
        arguments: Its arguments, turned into strings.
        fails: Whether an exit code other than 0 is expected.
        cwd: Current folder of the run; by default that of this process.
        env: Variables added to the environment of this process.

    Returns:
        Exit code and output.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        process = start_script(script, arguments, *files, cwd=cwd, env=env)
        wait(process)
        stdout, stderr = (file.read_text() for file in files)
    assert (process.exitcode != 0) == fails, stdout[-3000:] + stderr[-5000:]
    return subprocess.CompletedProcess([script, *arguments], process.exitcode, stdout, stderr)


def start_script(
    script: Path,
    arguments: Any,
    stdout: Path,
    stderr: Path,
    *,
    cwd: Optional[Path] = None,
    env: Optional[Mapping[str, str]] = None,
    before: Optional[Callable[[], Any]] = None,
) -> multiprocessing.Process:
    """Start a script whose output goes to files; ``before`` is called in its process first."""
    environment = {**os.environ, **(env or {})}
    given = (str(script), [*map(str, arguments)], stdout, stderr, str(cwd or Path.cwd()))
    process = servers.Process(target=_run, args=(*given, environment, before))
    process.start()
    return process


def wait(process: multiprocessing.Process, seconds: float = HANG) -> None:
    """Wait for a run; one that does not end is a hang, and is killed."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()


def _run(
    script: str,
    arguments: list[str],
    stdout: Path,
    stderr: Path,
    cwd: str,
    environment: dict[str, str],
    before: Optional[Callable[[], Any]],
) -> None:
    for path, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # As in a run of its own. DataLoader workers that the server forked would outlive a killed run.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [script, *arguments]
    # As Python does at its start.
    added = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [os.path.dirname(script), *added]
    if before is not None:
        before()
    runpy.run_path(script, run_name="__main__")
