"""Every code block of README and docs runs as written, and every link leads somewhere.

Blocks run in a folder like the one that a reader has after `make demo`: with the project's configs
and tools, an image, a dataset in COCO format in ``a``, and a model of random weights.

- Python: a page's blocks in their order, in one process. One with a title is written to a file of
  that name, for the page's commands, and is loaded as a LazyConfig unless a command runs it.
- YAML: merged over a detectron2 config, or read from a file of its title; its model is built.
- Shell: every command, also of the inline ones, is parsed by its own parser, and the config that it
  names is read with its overrides. In addition, commands that are cheap run (``CHEAP``), and so do
  scripts that the page wrote, for one iteration. A command of an unknown kind is an error.

Mutations tried by hand; each makes at least one test here fail: an option, a key of a YAML block, a
key of a command, an anchor, a suite's file and a make target misspelled.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model
from PIL import Image
from tiny_training import write_short_lamps
from tool_process import run_script
from torch.distributed.run import get_args_parser as torchrun_parser

from nonlocal_det import add_nonlocal_config
from nonlocal_det.ablation.small_suite import read_small_suite
from nonlocal_det.ablation.suite import read_suite
from nonlocal_det.config import load_config, load_lazy_config
from nonlocal_det.data import LampsParams, write_dataset
from nonlocal_det.layers import NonLocalBase
from nonlocal_det.modeling.supported_positions import check_positions

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?: title=\"(?P<title>.+?)\")?\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
FENCE = re.compile(r"^( *)(`{3,}).*?^\1\2$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python tools/|nonlocal-det |make |pip )[^`]+)`")
DEMO = "demo_mask_rcnn_R18_C3_NL.yaml"
# Run in full, by their beginning: seconds each, with the demo's model or none.
CHEAP = (
    "python tools/visualize_attention.py --input",
    "python tools/measure_attention.py --num-images",
    "python tools/train_net.py --check-data",
)
# For scripts of a page: one iteration of a narrow model.
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    *("DATASETS.TRAIN", "('lamps_train',)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
]
# Variables of the shell that the pages' scripts expect.
SHELL = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "1", "first": "node"}


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block: its language, the file it is written to, and its text."""

    language: str
    title: str
    text: str


def blocks_of(page: Path, *languages: str) -> list[CodeBlock]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    blocks = [CodeBlock(b["language"], b["title"] or "", textwrap.dedent(b["text"])) for b in found]
    return [block for block in blocks if block.language in languages]


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command of a page, in blocks and inline."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks_of(page, "sh") for line in joined_lines(block.text)]
    commands = []
    for line in [*lines, *INLINE.findall(FENCE.sub("", text))]:
        words = shlex.split(string.Template(line).safe_substitute(SHELL), comments=True)
        if words and not re.match(r"\w+=", words[0]):
            commands.append(words[1:] if words[0] == "srun" else words)
    return commands


def joined_lines(text: str) -> Iterator[str]:
    """The lines of a script, those that end in a backslash with the next."""
    return iter(re.sub(r"\\\n\s*", " ", text).splitlines())


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks_of(page, language)]


def name(page: Any) -> str:
    return page.stem if isinstance(page, Path) else str(page)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's folder."""
    folder = tmp_path_factory.mktemp("reader")
    for shared in ("configs", "nonlocal_det", "tools"):  # a checkout, with outputs of its own
        (folder / shared).symlink_to(ROOT / shared)
    for split in ("train", "val"):
        write_dataset(str(folder / "lamps"), split, 4, params=LampsParams(side=(96, 128)))
        (folder / "a").mkdir(exist_ok=True)
        shutil.move(folder / "lamps" / split, folder / "a" / split)
        file = folder / "lamps" / "annotations" / f"instances_{split}.json"
        shutil.copy(file, folder / "a" / f"{split}.json")
    coco = folder / "datasets" / "coco" / "annotations"
    coco.mkdir(parents=True)
    shutil.copy(folder / "a" / "val.json", coco / "instances_val2017.json")
    with Image.open(folder / "a" / "val" / "000001.png") as image:
        image.convert("RGB").save(folder / "image.jpg")
    write_short_lamps(folder / "datasets")
    cfg = load_config(str(ROOT / "configs" / DEMO))
    trained = folder / "output" / "demo" / "with_block"
    trained.mkdir(parents=True)
    torch.save({"model": build_model(cfg).state_dict()}, trained / "model_final.pth")
    for page in PAGES:
        for block in blocks_of(page, "python", "yaml"):
            if block.title:
                (folder / block.title).write_text(block.text)
    return folder


def run(folder: Path, *command: str) -> None:
    script, *arguments = command
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    env = {"DETECTRON2_DATASETS": str(folder / "datasets"), "PYTHONPATH": path}
    run_script(folder / script, *arguments, cwd=folder, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("python"), ids=name)
def test_python_blocks(page: Path, folder: Path) -> None:
    parts = [block.text for block in blocks_of(page, "python") if not block.title]
    (folder / f"{page.stem}_blocks.py").write_text("\n".join(parts))
    run(folder, f"{page.stem}_blocks.py")


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("python"), ids=name)
def test_files_of_python_are_lazy_configs_or_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    run_by_a_command = {words[1] for words in commands_of(page) if words[0] == "python"}
    for block in blocks_of(page, "python"):
        if block.title and block.title not in run_by_a_command:
            assert has_blocks(instantiate(load_lazy_config(block.title).model))


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=name)
def test_yaml_blocks(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for number, block in enumerate(blocks_of(page, "yaml")):
        if block.title:
            cfg = load_config(block.title)
        else:
            (folder / f"{page.stem}{number}.yaml").write_text(block.text)
            cfg = get_cfg()
            add_nonlocal_config(cfg)
            zoo = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
            cfg.merge_from_file(zoo)
            cfg.merge_from_file(f"{page.stem}{number}.yaml")
        cfg.MODEL.DEVICE = "cpu"
        assert has_blocks(build_model(cfg))


def has_blocks(model: torch.nn.Module) -> bool:
    return any(isinstance(module, NonLocalBase) for module in model.modules())


@pytest.mark.parametrize("page", with_blocks("sh"), ids=name)
def test_shell_blocks_are_shell(page: Path) -> None:
    for block in blocks_of(page, "sh"):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=name)
def test_commands(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for words in commands_of(page):
        print(shlex.join(words))  # shown where it fails
        check_command(words)


CHEAP_COMMANDS = [
    words for page in PAGES for words in commands_of(page) if shlex.join(words).startswith(CHEAP)
]


@pytest.mark.slow
@pytest.mark.parametrize("words", CHEAP_COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_cheap_commands_run(words: list[str], folder: Path) -> None:
    run(folder, *words[1:])


@pytest.mark.slow
def test_the_readme_s_script_trains(folder: Path) -> None:
    (words,) = [w for w in commands_of(ROOT / "README.md") if w[:2] == ["python", "train_net.py"]]
    run(folder, *words[1:], "--num-gpus", "0", "OUTPUT_DIR", "output/stock_script", *TINY)
    assert (folder / "output" / "stock_script" / "model_final.pth").exists()


# What a command must be, by its first word.


def check_command(words: list[str]) -> None:
    """Raise, or exit as a parser does, unless a command could be run here."""
    program, arguments = words[0], words[1:]
    if program == "torchrun":
        given = torchrun_parser().parse_args(arguments)
        check_script(given.training_script, given.training_script_args)
    elif program in ("python", ".venv/bin/python"):
        check_python(arguments)
    elif program == "nonlocal-det":
        commands = importlib.import_module("nonlocal_det.cli").COMMANDS
        assert arguments[0] in commands
    elif program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        check_pip(arguments)
    else:
        raise AssertionError(f"A command of an unknown kind: {shlex.join(words)}")


def check_python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "pytest"]:
        check_pytest(arguments[2:])
    else:
        check_script(arguments[0], arguments[1:])


def check_script(script: str, arguments: list[str]) -> None:
    """A tool's arguments by its own parser, and the files that they name."""
    assert any((base / script).is_file() for base in (ROOT, Path())), script
    if not script.startswith("tools/"):
        return
    command = re.search(r"from nonlocal_det\.cli\.(\w+) import main", (ROOT / script).read_text())
    if command is None:
        assert not arguments, f"{script} takes no arguments"
        return
    args = importlib.import_module(f"nonlocal_det.cli.{command[1]}").parse_args(arguments)
    options = getattr(args, "opts", None) or []
    config_file = getattr(args, "config_file", None)
    if config_file and config_file.endswith(".py"):
        load_lazy_config(config_file, options)
    elif config_file:
        check_positions(load_config(config_file, options))
    if getattr(args, "suite", None):
        {"ablate": read_suite, "ablate_small": read_small_suite}[command[1]](args.suite)


def check_pytest(arguments: list[str]) -> None:
    markers = (ROOT / "pyproject.toml").read_text()
    for option, value in zip(arguments, arguments[1:]):
        if option == "-m":
            assert f'"{value.split()[-1]}:' in markers
    for word in arguments:
        assert not word.startswith("tests/") or (ROOT / word).is_file()


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    wanted = arguments[-1]
    if wanted.startswith("git+"):
        official = (ROOT / "tools" / "install_detectron2.py").read_text()
        assert wanted[len("git+") : -len(".git")] in official
    else:
        extra = re.fullmatch(r"\.\[(.+)\]", wanted)[1]
        project = (ROOT / "pyproject.toml").read_text()
        assert re.search(rf"^{re.escape(extra)} = \[", project, re.MULTILINE), wanted


# Links.


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and ROOT in (file, *file.parents), target
        assert not anchor or anchor in anchors_of(file), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert f": {page.name}" in navigation
        if page.name != "index.md":
            assert f"(docs/{page.name})" in readme and f"({page.name})" in index


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    loads = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?https?:|<link[^>]+href=\"?https?:")
    for page in pages:
        found = loads.search(page.read_text(encoding="utf-8"))
        assert found is None or 'rel="canonical"' in found[0], found
