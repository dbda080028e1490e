"""The command lines that draw and measure attention, and the hook that watches it in training.

Each of these was broken by hand, and a test failed: pairs of a query with itself counted; entropy
not relative; what a block adds with its input; a hook that shifts the trainer's random draws,
leaves the model in evaluation mode, or is one iteration off; EXIF or transparency ignored; 16
bits cut off.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os

import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from PIL import Image

from nonlocal_det import NonLocalBlock
from nonlocal_det.attention import AttentionRecorder
from nonlocal_det.attention.hook import AttentionHook, output_weight
from nonlocal_det.attention.image_io import expand_inputs, is_video, read_image_rgb, read_video
from nonlocal_det.attention.statistics import (
    AttentionStats,
    average_distance,
    mean,
    measure,
    relative_entropy,
)
from nonlocal_det.config import load_config
from nonlocal_det.data.lamps.writer import annotation_file, image_root, write_dataset
from nonlocal_det.engine import Trainer

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = os.path.join(PROJECT, "configs", "lamps_mask_rcnn_R18_NL.yaml")


def tool(name: str):
    """A script of tools/ as a module."""
    path = os.path.join(PROJECT, "tools", f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lamps(tmp_path_factory) -> str:
    """The name of a registered dataset of three pictures."""
    from detectron2.data.datasets import register_coco_instances

    folder, name = str(tmp_path_factory.mktemp("lamps")), "attention_test_lamps"
    write_dataset(folder, "val", 3)
    files = annotation_file(folder, "val"), image_root(folder, "val")
    register_coco_instances(name, {}, *files)
    DatasetCatalog.get(name)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def colors(width: int = 60, height: int = 40) -> np.ndarray:
    """A picture whose top left quarter is red, RGB."""
    image = np.full((height, width, 3), (40, 90, 160), np.uint8)
    image[: height // 2, : width // 2] = (220, 20, 30)
    return image


RED, BLUE = (220, 20, 30), (40, 90, 160)


def save(path, kind: str) -> None:
    """Write `colors` as a file of some kind."""
    image = Image.fromarray(colors())
    if kind == "exif":
        # Turned to the left, with the note that it must be turned to the right.
        exif = image.getexif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    elif kind == "16 bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    elif kind == "transparent":
        array = np.dstack([colors(), np.full((40, 60), 255, np.uint8)])
        array[:20, :30, 3] = 0
        Image.fromarray(array).save(path)
    elif kind == "P":
        image.quantize(4).save(path)
    else:
        image.convert(kind).save(path)


@pytest.mark.parametrize(
    "kind, name, top_left, bottom_right",
    [
        ("RGB", "a.png", RED, BLUE),
        ("P", "a.gif", RED, BLUE),
        ("RGBA", "a.png", RED, BLUE),
        ("CMYK", "a.jpg", RED, BLUE),
        ("exif", "a.jpg", RED, BLUE),
        ("transparent", "a.png", (255, 255, 255), BLUE),
        # 0.299 R + 0.587 G + 0.114 B
        ("L", "a.png", (81,) * 3, (83,) * 3),
        ("16 bit", "a.png", (81,) * 3, (83,) * 3),
        ("F", "a.tiff", (81 * 255 / 83,) * 3, (255,) * 3),
    ],
)
def test_pictures_of_all_kinds_are_read_as_they_are_seen(
    tmp_path, kind, name, top_left, bottom_right
):
    save(tmp_path / name, kind)
    image = read_image_rgb(str(tmp_path / name))
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8
    # JPEG and palettes change colours a little.
    np.testing.assert_allclose(image[5, 5], top_left, atol=12)
    np.testing.assert_allclose(image[-5, -5], bottom_right, atol=12)


def test_broken_files_are_told(tmp_path):
    text, half = tmp_path / "text.jpg", tmp_path / "half.png"
    text.write_text("not an image")
    save(half, "RGB")
    half.write_bytes(half.read_bytes()[:90])
    for path in (text, half):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            read_image_rgb(str(path))
    text.rename(tmp_path / "text.avi")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_video(str(tmp_path / "text.avi"))
    for read in (read_image_rgb, read_video):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            read(str(tmp_path / "missing"))


def test_files_are_found_in_folders_and_by_patterns(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.mp4", "notes.txt"):
        (tmp_path / name).touch()
    folder = str(tmp_path)
    found = [os.path.basename(path) for path in expand_inputs([folder, folder + "/a*"])]
    assert found == ["a.jpg", "b.PNG", "c.mp4"]
    assert expand_inputs([folder + "/notes.txt"]) == [folder + "/notes.txt"]
    # What does not exist stays, to be told later.
    assert expand_inputs([folder + "/no.jpg", folder + "/z*"]) == [
        folder + "/no.jpg",
        folder + "/z*",
    ]
    assert [is_video(path) for path in ("a.MP4", "a.jpg")] == [True, False]


def visualize(*arguments: object) -> int:
    """Run the tool on an untrained model."""
    return tool("visualize_attention").main(
        ["--config-file", CONFIG, *map(str, arguments)]
        + ["MODEL.NONLOCAL.POSITIONS", "('res4[-2]', 'mask_head[0]')"]
    )


def test_a_batch_goes_on_past_what_cannot_be_drawn(tmp_path, capsys):
    inputs, output = tmp_path / "in", tmp_path / "new" / "out"
    inputs.mkdir()
    for name, kind in (("rgb.png", "RGB"), ("rgb.jpg", "RGB"), ("exif.jpg", "exif")):
        save(inputs / name, kind)
    (inputs / "broken.jpg").write_text("no")
    Image.new("RGB", (1, 1)).save(inputs / "pixel.png")
    options = ("--score", 0, "--count", 2, "--format", "png", "pdf", "--html")
    assert visualize("--input", inputs, "--output", output, *options) == 1
    stems = ("exif", "pixel", "rgb", "rgb-2")
    assert sorted(os.listdir(output)) == sorted(
        f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf", "html")
    )
    printed, errors = capsys.readouterr()
    assert len([line for line in printed.splitlines() if line.startswith(str(output))]) == 12
    assert "left out: " in errors and "broken.jpg' cannot be read as an image" in errors


def test_points_and_no_detection(tmp_path, capsys):
    save(tmp_path / "a.png", "RGB")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    files = ("--input", tmp_path / "a.png", tmp_path / "small.png", "--output", tmp_path / "out")
    # The point lies outside of the second picture.
    assert visualize(*files, "--point", "55,30", "--point", "1,1", "--html") == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["a.html", "a.png"]
    assert "The point (55, 30) lies outside: x goes from 0 to 20" in capsys.readouterr().err
    # No detection: the picture alone.
    assert visualize(*files, "--score", 1.1) == 0
    assert "small.png" in os.listdir(tmp_path / "out")


def test_video_becomes_a_video(tmp_path):
    path, output = str(tmp_path / "clip.avi"), tmp_path / "out"
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 5, (60, 40))
    for _ in range(3):
        writer.write(colors()[:, :, ::-1])
    writer.release()
    assert visualize("--input", path, "--output", output, "--score", 0) == 0
    frames, rate = read_video(str(output / "clip.mp4"))
    shapes = [frame.shape for frame in frames]
    # The detections and two blocks, each 480 wide.
    assert shapes == [(320, 3 * 480, 3)] * 3 and rate == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config-file", CONFIG, "--weights", "missing.pth"],
            "MODEL.WEIGHTS is 'missing.pth', which is not a file",
        ),
        (["--config-file", "missing.yaml"], "There is no configuration file 'missing.yaml'"),
        (
            ["--config-file", CONFIG, "--block", "res9"],
            "No block's name contains 'res9'; there are",
        ),
        (
            ["--config-file", CONFIG, "MODEL.NONLOCAL.POSITIONS", "()"],
            "The model has no non-local blocks to look at",
        ),
    ],
)
def test_wrong_arguments_end_with_one_sentence(tmp_path, arguments, message):
    save(tmp_path / "a.png", "RGB")
    files = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message):
        tool("visualize_attention").main(files + arguments)


def test_folder_that_cannot_be_written_ends_with_one_sentence(tmp_path):
    save(tmp_path / "a.png", "RGB")
    files = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.png" / "out")]
    with pytest.raises(SystemExit, match="error: .*a.png"):
        tool("visualize_attention").main(files)


def test_average_distance_by_hand():
    # Cosines: 1 between the first two, 0 and 0 with the third: (0 + 1/2 + 1/2) / 3.
    vectors = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    assert average_distance(vectors) == pytest.approx(1 / 3)
    assert average_distance(np.array([[1.0, 2.0], [-2.0, -4.0]])) == pytest.approx(1)
    # A zero vector has no direction.
    assert average_distance(np.vstack([vectors, np.zeros(2)])) == pytest.approx(1 / 3)
    assert math.isnan(average_distance(np.zeros((3, 2))))


def test_relative_entropy_by_hand():
    assert relative_entropy(np.full((2, 5), 0.2)) == pytest.approx(1)
    assert relative_entropy(np.eye(3)) == pytest.approx(0)
    # Half on each of two of four keys: log 2 / log 4; signs and sums do not count.
    assert relative_entropy(np.array([[3.0, -3.0, 0.0, 0.0]])) == pytest.approx(0.5)
    assert math.isnan(relative_entropy(np.zeros((2, 3))))
    assert math.isnan(relative_entropy(np.ones((2, 1))))


def test_mean_leaves_out_what_is_unknown():
    one, two = AttentionStats(1, math.nan, 2, 3, 4), AttentionStats(3, 5, 4, 3, 2)
    assert mean([one, None, two]) == AttentionStats(2, 5, 3, 3, 3)
    assert mean([None]) is None


def measured(block: nn.Module) -> AttentionStats:
    torch.manual_seed(0)
    with AttentionRecorder(nn.Sequential(block.eval())) as recorder:
        recorder._model(torch.randn(1, 8, 9, 12))
    return measure(recorder, "0", queries=20)


def test_block_is_measured_as_it_is():
    block = NonLocalBlock(8, norm="")
    new = measured(block)
    # A new block adds nothing.
    assert new.gain == 0 and math.isnan(new.added) and 0 < new.maps < 0.5
    # The same query everywhere: one map, and one vector added.
    nn.init.zeros_(block.theta.weight)
    nn.init.normal_(block.out.weight)
    same = measured(block)
    assert same.maps == pytest.approx(0, abs=1e-6) and same.added == pytest.approx(0, abs=1e-6)
    assert same.gain > 0 and same.inputs == pytest.approx(new.inputs)
    # Equal keys: a uniform map.
    nn.init.zeros_(block.phi.weight)
    assert measured(block).entropy == pytest.approx(1)


def test_tool_measures_a_dataset(tmp_path, lamps, capsys):
    arguments = ["--config-file", CONFIG, "--dataset", lamps, "--images", "2"]
    blocks = "('res4[-2]', 'p4', 'mask_head[0]')"
    arguments += ["--output", str(tmp_path / "out"), "MODEL.NONLOCAL.POSITIONS", blocks]
    assert tool("measure_attention").main(arguments) == 0
    with open(tmp_path / "out" / "attention.csv", newline="") as file:
        rows = {row["block"]: row for row in csv.DictReader(file)}
    assert "backbone.bottom_up.res4.nl0" in rows and "backbone.non_local.p4" in rows
    for row in rows.values():
        assert 0 <= float(row["maps"]) <= 0.5 and 0 <= float(row["entropy"]) <= 1
        assert float(row["gain"]) == 0
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "backbone.non_local.p4" in capsys.readouterr().out


class Storage(EventStorage):
    """Keeps every number and picture that is put into it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.numbers, self.images = [], []

    def put_scalar(self, name, value, smoothing_hint=True, **options):
        self.numbers.append((self.iter, name, value))
        super().put_scalar(name, value, smoothing_hint, **options)

    def put_image(self, name, image):
        self.images.append((self.iter, name, image))


def train(cfg, monkeypatch, *hooks) -> tuple[dict, Storage]:
    """The weights after training, and what was written."""
    from detectron2.engine import train_loop

    kept = []
    monkeypatch.setattr(
        train_loop, "EventStorage", lambda start: kept.append(Storage(start)) or kept[0]
    )
    seed_all_rng(7)
    trainer = Trainer(cfg)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer.model.state_dict(), kept[0]


def test_hook_writes_and_leaves_training_as_it_is(tmp_path, lamps, monkeypatch):
    cfg = load_config(CONFIG)
    cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = str(tmp_path), (lamps,), ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = 3, 1
    cfg.TEST.EVAL_PERIOD = 0
    without, _ = train(cfg, monkeypatch)
    watched = cfg.clone()
    watched.DATASETS.TEST = (lamps,)
    weights, storage = train(cfg, monkeypatch, AttentionHook(watched, period=2, pictures=2))

    assert all(torch.equal(weights[name], value) for name, value in without.items())
    name = "attention/backbone.bottom_up.res4.nl0"
    assert [(step, image) for step, image, _ in storage.images] == [
        (step, f"{name}/{index}") for step in (1, 2) for index in (0, 1)
    ]
    picture = storage.images[0][2]
    assert picture.dtype == np.uint8 and picture.shape[0] == 3 and max(picture.shape) == 480
    written = {(step, key): value for step, key, value in storage.numbers if "attention" in key}
    keys = [f"{name}/{kind}" for kind in ("entropy", "gain", "distance", "output_weight")]
    assert sorted(written) == sorted((step, key) for step in (1, 2) for key in keys)
    # After two steps the block has begun to learn.
    assert written[1, f"{name}/gain"] > 0 and written[1, f"{name}/output_weight"] > 0


@pytest.mark.parametrize("norm", ["", "BN"])
def test_output_weight_is_zero_for_a_new_block_only(norm):
    block = NonLocalBlock(4, norm=norm)
    assert output_weight(block) == 0
    nn.init.constant_(block.out.weight, -3.0)
    if norm:
        nn.init.constant_(block.norm.weight, 0.5)
    assert output_weight(block) == pytest.approx(1.5 if norm else 3.0)
