"""The demo: what it makes of two trainings, and its page in a real headless browser.

Mutations tried by hand; each makes at least one test here fail: the stock model with a block; near
and far exchanged, in the APs and in the table; the first overlapping detection instead of the most
confident one, or any; a glow of twice the size; the class of another number; masks scored as boxes;
a curve upside down; images wider than the page; crosses on what is correct; an attention map that
is not drawn; a training that does not resume; both at once on one core; trainings left running.
"""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_explorer import browser, resize
from tiny_training import write_short_lamps
from tool_process import run_tool

from nonlocal_det.cli import demo
from nonlocal_det.config import load_config
from nonlocal_det.data.builtin import DATASETS
from nonlocal_det.demo import side_by_side
from nonlocal_det.demo.outcome import (
    Scene,
    Shape,
    attention_on_cue,
    check_images,
    chosen_scenes,
    read_scenes,
    scores,
    share_correct,
)
from nonlocal_det.demo.page import Row, View, demo_page
from nonlocal_det.demo.side_by_side import Model, train_models
from nonlocal_det.demo.strips import draw_scene

SMALL = [
    *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0001"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "10", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
]
PARAMS = DATASETS["unlit_long"].params


# ---- what the models detect


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_short_lamps(tmp_path_factory.mktemp("datasets"), "unlit_long")


@pytest.fixture(scope="module")
def json_file(datasets: Path) -> str:
    return str(datasets / "unlit_long" / "annotations" / "instances_val.json")


def perfect(json_file: str) -> list[dict]:
    """Detections that are the annotations themselves, lamps included."""
    content = json.loads(Path(json_file).read_text())
    kept = ("image_id", "category_id", "bbox")
    return [{**{k: a[k] for k in kept}, "score": 0.9} for a in content["annotations"]]


def test_scenes_hold_the_shapes_and_who_is_correct(json_file: str) -> None:
    content = json.loads(Path(json_file).read_text())
    right = perfect(json_file)
    wrong = [{**d, "category_id": d["category_id"] % 4 + 1} for d in right]
    scenes = read_scenes(json_file, [wrong, right], PARAMS)
    shapes = [shape for scene in scenes for shape in scene.shapes]
    num_lamps = sum(len(image["cues"]) for image in content["images"])
    assert len(shapes) == len(content["annotations"]) - num_lamps
    assert not any(s.is_correct(0) for s in shapes) and all(s.is_correct(1) for s in shapes)
    for scene, image in zip(scenes, content["images"]):
        assert [scene.cue] == [tuple(cue) for cue in image["cues"]] or scene.cue is None
        assert {shape.category for shape in scene.shapes} == {scene.category}
        assert (scene.category == 3) == (scene.cue is None)
        low, high = (size / 2 * PARAMS.halo for size in PARAMS.lamp_size)
        assert scene.cue is None or low - 0.1 <= scene.cue_radius <= high + 0.1
        for shape in scene.shapes:
            x, y, width, height = shape.box
            center = (x + width / 2, y + height / 2)
            far = math.nan if scene.cue is None else math.dist(center, scene.cue)
            assert shape.distance == pytest.approx(far, abs=0.02, nan_ok=True)
    distances = [s.distance for s in shapes if not math.isnan(s.distance)]
    middle = sorted(distances)[len(distances) // 2]
    assert share_correct(scenes, 1, 0, middle) == share_correct(scenes, 1, middle) == 1
    assert share_correct(scenes, 0, middle) == 0 and math.isnan(share_correct(scenes, 1, 1e4))


def test_the_most_confident_detection_of_a_shape_counts(json_file: str) -> None:
    right = perfect(json_file)
    more = [{**d, "category_id": d["category_id"] % 4 + 1, "score": 0.95} for d in right]
    elsewhere = [{**d, "bbox": [0, -100, 30, 30], "score": 0.99} for d in more]
    for added, expected in ((more, False), (elsewhere, True)):
        scenes = read_scenes(json_file, [[*right, *added]], PARAMS)
        assert all(s.is_correct(0) is expected for scene in scenes for s in scene.shapes)
    (none,) = {s.detections for scene in read_scenes(json_file, [[]], PARAMS) for s in scene.shapes}
    assert none == (None,)


def test_other_images_are_refused(json_file: str) -> None:
    with pytest.raises(ValueError, match="are those of unlit_long"):
        check_images(json_file, DATASETS["lamps_long"].params)
    check_images(json_file, PARAMS)


def test_aps_of_near_and_far_shapes(json_file: str) -> None:
    """Wrong classes beyond a distance leave the AP of the nearer shapes at 100."""
    content = json.loads(Path(json_file).read_text())
    limit = 150
    found = perfect(json_file)
    for detection, annotation in zip(found, content["annotations"]):
        detection["segmentation"] = annotation["segmentation"]
        if (annotation["cue_distance"] or 0) >= limit:
            detection["category_id"] = detection["category_id"] % 4 + 1
    near, far = scores(json_file, found, limit)["box"]
    assert near["AP"] == pytest.approx(100) and far["AP"] < 20
    assert near["count"] > 3 and far["count"] > 3
    # Masks of half the width and height.
    for detection in found:
        points = np.reshape(detection["segmentation"][0], (-1, 2))
        center = np.add(detection["bbox"][:2], np.divide(detection["bbox"][2:], 2))
        detection["segmentation"] = [((points + center) / 2).ravel().tolist()]
    both = scores(json_file, found, limit)
    assert both["box"][0]["AP"] == pytest.approx(100) and both["mask"][0]["AP"] == 0


def scene(distances: list[float], *, image_id: int = 1, category: int = 0) -> Scene:
    """Shapes to the right of a cue of radius 40 at (30, 30), all classified rightly."""
    shapes = []
    for distance in distances:
        box = (20.0 + distance, 20.0, 20.0, 20.0)
        found = {"bbox": box, "category_id": category + 1, "score": 0.9}
        shapes.append(Shape(box, category, distance, (None, found)))
    return Scene(image_id, "1.png", category, (30.0, 30.0), 40.0, tuple(shapes))


def test_attention_on_the_cue_is_within_its_glow() -> None:
    keys = {1: [(30.0, 69.0, 0.1), (30.0, 71.0, 0.1), None, (31.0, 30.0, 0.1)]}
    of_four = [scene([100.0, 150.0, 200.0, 250.0])]
    assert attention_on_cue(of_four, keys, 0, 1) == (2, 3)
    assert attention_on_cue(of_four, keys, 120, 1) == (1, 2)
    assert attention_on_cue(of_four, keys, 0, 0) == (0, 0)  # the stock model is never right


def test_scenes_are_chosen_of_every_class_in_turn() -> None:
    scenes = [
        scene([300.0], image_id=i, category=category)
        for i, category in enumerate([1, 1, 1, 0, 2, 0, 1])
    ]
    scenes[1] = scene([50.0], image_id=1, category=1)  # too near
    chosen = chosen_scenes(scenes, 5, beyond=100)
    assert [s.image_id for s in chosen] == [3, 0, 4, 5, 2]
    assert chosen_scenes(scenes, 5, beyond=400) == []


def test_a_drawing_shows_classes_mistakes_and_attention() -> None:
    image = np.full((64, 512, 3), 40, np.uint8)
    one, colors = scene([300.0]), [(255, 0, 0), (0, 255, 0)]
    x, y = 330 * 3, 30 * 3
    right, missed = (draw_scene(image, one, model, colors) for model in (1, 0))
    assert right.shape == (192, 1536, 3)
    red, gray = right[y + 20, x].astype(int), missed[y + 20, x].astype(int)
    assert red[0] - red[1] > 80 and abs(gray[0] - gray[1]) < 3
    assert (missed[y - 6 : y + 7, x - 6 : x + 7] == 150).all(axis=2).any()  # a gray cross
    attn_map = np.zeros((64, 512), np.float32)
    attn_map[25:36, 25:36] = 1
    drawn = draw_scene(image, one, 1, colors, attn_map=attn_map, top_keys=[(30.0, 30.0, 1.0)])
    assert drawn[90, 90].sum() > 400 and (drawn[2, 700] == 40).all()
    assert (drawn[:, 700] == 255).all(axis=1).any()  # the arrow


# ---- trainings


def script(folder: Path, text: str) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", text], cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )


LINE = '{"iteration": %d, "fast_rcnn/fg_cls_accuracy": %g, "eta_seconds": 65.4}'


def trainings(tmp_path: Path) -> tuple[Model, Model]:
    return tuple(Model(name, str(tmp_path / name), ()) for name in ("stock", "block"))


@pytest.mark.parametrize("at_once", [True, False])
def test_progress_of_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Processes that write what a training writes: iterations 20 and 40 of 40."""
    running = []

    def start(config: str, options: tuple[str, ...], folder: str) -> subprocess.Popen[bytes]:
        assert at_once or all(process.poll() == 0 for process in running)
        share = 0.25 if folder.endswith("stock") else 0.99
        lines = [LINE % (i, share) for i in (19, 39)]
        text = "import time\n" + "".join(
            f"time.sleep(1); print({line!r}, file=open('metrics.json', 'a'))\n" for line in lines
        )
        running.append(script(Path(folder), text + "time.sleep(1)"))
        return running[-1]

    monkeypatch.setattr(side_by_side, "start_training", start)
    shown: list[str] = []
    train_models(trainings(tmp_path), "", at_once=at_once, max_iter=40, show=shown.append)
    assert shown[0].split() == "iteration stock block time left".split()
    rows = [line.split() for line in shown[1:]]
    first = ["25%", "99%"] if at_once else ["25%"]
    assert rows[0][:3] == ["20", "of", "40"] and rows[0][3:-1] == first
    assert rows[0][-1] == "1:05"
    assert rows[1][:3] == ["40", "of", "40"] and rows[1][-1] == "evaluating"
    assert len(rows) == (2 if at_once else 4) and rows[-1][3:5] == ["25%", "99%"]


def test_a_training_that_fails_ends_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(config: str, options: tuple[str, ...], folder: str) -> subprocess.Popen[bytes]:
        fails = "print('first'); print('why it failed'); raise SystemExit(3)"
        text = fails if folder.endswith("stock") else "import time; time.sleep(600)"
        started.append(script(Path(folder), text))
        return started[-1]

    monkeypatch.setattr(side_by_side, "start_training", start)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"stock failed with exit code 3: .*\. why it failed$"):
        train_models(trainings(tmp_path), "", at_once=True, max_iter=40)
    assert all(process.poll() is not None for process in started)
    assert time.monotonic() - begin < 300  # not until the other ends by itself


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, datasets: Path) -> tuple[Path, str]:
    """The output folder of a short demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, datasets)


def run_demo(folder: Path, datasets: Path, **options: bool) -> str:
    env = {"DETECTRON2_DATASETS": str(datasets)}
    done = run_tool("demo", "--output", folder, *SMALL, env=env, **options)
    return done.stderr if options.get("fails") else done.stdout


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"  with.* a block +[\d.–]+ ", line)]


@pytest.mark.slow
def test_a_demo_ends_with_a_table_and_a_page(finished: tuple[Path, str]) -> None:
    folder, text = finished
    names = [line.split("  ")[1] for line in table(text)]
    assert names == ["without a block", "with a block"]
    page = (folder / "index.html").read_text()
    for line in table(text):
        name, *numbers = re.split(r"  +", line.strip())
        cells = "".join(f"<td>{value}</td>" for value in numbers)
        assert len(numbers) == 6 and f"{html.escape(name)}</th>{cells}" in page
    links = re.findall(r'href="(explorer/[^"]+)"', page)
    assert links and all((folder / link).stat().st_size > 10_000 for link in links)
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert (folder / "index.html").as_uri() in text
    for name, has_block in (("with_block", True), ("without_block", False)):
        log = (folder / name / "output.txt").read_text()
        assert ("res3.nl0" in log) == has_block


@pytest.mark.slow
def test_a_finished_demo_trains_nothing_and_says_the_same(
    finished: tuple[Path, str], datasets: Path
) -> None:
    folder, text = finished
    weights = (folder / "with_block" / "model_final.pth").read_bytes()
    page = (folder / "index.html").read_text()
    assert table(run_demo(folder, datasets)) == table(text)
    assert (folder / "with_block" / "model_final.pth").read_bytes() == weights
    assert (folder / "index.html").read_text() == page
    log = (folder / "with_block" / "log.txt").read_text()
    assert log.count("Starting training from iteration 0") == 1


def test_files_of_the_user_are_kept(datasets: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="not an earlier"):
        patch.setenv("DETECTRON2_DATASETS", str(datasets))
        demo.main(["--output", str(tmp_path)])
    assert (tmp_path / "index.html").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_how_a_demo_trains(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One after the other on one core; and a demo that is stopped says how to continue."""
    given = []
    monkeypatch.setattr(demo, "train_models", lambda *_, **options: given.append(options))
    cfg = load_config(demo.CONFIG, [])
    for cores, expected in ((1, "one after the other"), (2, "side by side")):
        monkeypatch.setattr(demo, "num_cores", lambda cores=cores: cores)
        demo.train((), cfg, "")
        assert expected in capsys.readouterr().out
    assert [options["at_once"] for options in given] == [False, True]
    assert given[0]["max_iter"] == cfg.SOLVER.MAX_ITER

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_models", stop)
    with pytest.raises(SystemExit) as caught:
        demo.train((), cfg, "")
    assert caught.value.code == 130 and "The same command continues" in capsys.readouterr().out


# ---- the page


@pytest.fixture(scope="module")
def driver() -> Iterator[object]:
    driver = browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page() -> str:
    curve = [(32.0, 40.0), (100.0, 30.0), (300.0, math.nan), (400.0, 20.0)]
    rows = [
        Row("without <b>", (33.3, 31.0, 34.0), (32.1, 30.5, math.nan), curve),
        Row("with a block", (90.1, 88.0, 100.0), (89.5, 87.1, 99.9), [(d, 99.0) for d, _ in curve]),
    ]
    strip = np.zeros((192, 1536, 3), np.uint8)
    views = [View("<1>.png", (strip, strip), (1, 5), 5, "explorer/1.html")]
    return demo_page(
        rows, views, reach=176.4, lead="lead <i>", result="r", command="c --x", machine="m"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1440, 820, 390])
def test_the_page_in_a_browser(driver, page: str, tmp_path: Path, width: int, dark: bool) -> None:
    (tmp_path / "index.html").write_text(page, encoding="utf-8")
    resize(driver, width, 900, touch=width < 500, dark=dark)
    driver.get((tmp_path / "index.html").as_uri())
    assert driver.get_log("browser") == []
    wide, loaded, bars = driver.execute_script(
        "return [document.documentElement.scrollWidth,"
        "[...document.images].every(i => i.complete && i.naturalWidth === 1536),"
        "[...document.querySelectorAll('td')].map(t => t.innerText)]"
    )
    assert wide <= width and loaded
    assert bars == "33.3 31.0 34.0 32.1 30.5 – 90.1 88.0 100.0 89.5 87.1 99.9".split()
    assert driver.find_element("css selector", "tbody th").text == "without <b>"
    heights = driver.execute_script(
        "return ['without', 'with'].map(c => [...document.querySelectorAll(`circle.${c}`)]"
        ".map(p => p.getBoundingClientRect().top))"
    )
    assert len(heights[0]) == 3 and len(heights[1]) == 4
    assert heights[0] == sorted(heights[0])  # falls
    assert max(heights[1]) < min(heights[0])  # higher AP, higher on the page
