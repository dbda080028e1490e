"""The dispatcher of ``nonlocal-det``: what it lists, what it starts, and what it refuses.

Mutations tried by hand; each makes at least one test here fail: an exit code that is lost; the
command's own name among its arguments.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import nonlocal_det
from nonlocal_det import cli

ROOT = Path(__file__).resolve().parents[1]
# Without former names, and train_net.py, which test_launch.py starts.
TOOLS = [
    script
    for script in sorted((ROOT / "tools").glob("*.py"))
    if "nonlocal_det.cli" in script.read_text()
    and script.stem not in ("train_net", "analyze_model", "compare")
]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_each_command_on_one_line(argv, capsys):
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, purpose in cli.COMMANDS.items():
        assert sum(line.split(maxsplit=1) == [name, purpose] for line in lines) == 1
    assert max(map(len, lines)) <= 100


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"nonlocal-det {nonlocal_det.__version__} (detectron")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vizualise", "visualize"),
        ("training", "train"),
        ("lazy_train", "lazy-train"),
        ("check", "check-data"),
        ("qqq", "benchmark"),  # like none: all are listed
    ],
)
def test_an_unknown_command_is_told_the_nearest(name, nearest, capsys):
    assert cli.main([name]) == 2
    said = capsys.readouterr()
    assert repr(name) in said.err and nearest in said.err and said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_module(name):
    assert find_spec(f"nonlocal_det.cli.{name.replace('-', '_')}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage:") and "--help" in said


def test_a_command_gets_the_rest_and_gives_its_exit_code(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text("main = lambda argv: len(argv)\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.COMMANDS, "made-up", "count its arguments")
    assert cli.main(["made-up", "--config-file", "x", "KEY", "VALUE"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", TOOLS, ids=lambda script: script.stem)
def test_every_tool_starts(script, tmp_path):
    """By Python itself, from any folder; other tests fork processes that have imported torch."""
    command = [sys.executable, "-W", "ignore", str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script.name}")


@pytest.mark.slow
def test_the_process_ends_with_the_exit_code():
    command = [sys.executable, "-W", "ignore", "-m", "nonlocal_det", "trian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean train" in done.stderr
