"""The commands that draw and measure attention, and the hook that monitors it during training.

Mutations tried by hand; each makes at least one test here fail: pairs of a query with itself
counted; entropy not relative; a residual that includes the input; a hook that shifts the trainer's
random numbers, leaves the model in evaluation mode, or is one iteration off; EXIF or transparency
ignored; 16 bits truncated; a former option that sets nothing.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from PIL import Image

from nonlocal_det import NonLocalBlock
from nonlocal_det.attention import AttentionRecorder, queries_from_instances
from nonlocal_det.attention.figures.image_io import (
    expand_inputs,
    is_video,
    read_image_rgb,
    read_video,
)
from nonlocal_det.attention.figures.visualizer import AttentionVisualizer, matching_metadata
from nonlocal_det.attention.hook import (
    AttentionHook,
    _largest_object_query,
    output_weight_rms,
)
from nonlocal_det.attention.recording.statistics import (
    AttentionStats,
    attention_stats,
    average_distance,
    mean_stats,
    relative_entropy,
)
from nonlocal_det.checkpoint.predictor import Predictor
from nonlocal_det.cli import measure_attention, visualize
from nonlocal_det.config import load_config
from nonlocal_det.data.lamps.writer import annotation_file, image_root, write_dataset
from nonlocal_det.engine import Trainer

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = os.path.join(PROJECT, "configs", "lamps_mask_rcnn_R18_NL.yaml")


@pytest.fixture(scope="module")
def lamps(tmp_path_factory) -> str:
    """Register a dataset of three images and return its name."""
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
    """An RGB image whose top left quarter is red and whose rest is blue."""
    image = np.full((height, width, 3), (40, 90, 160), np.uint8)
    image[: height // 2, : width // 2] = (220, 20, 30)
    return image


RED, BLUE = (220, 20, 30), (40, 90, 160)


def save(path, kind: str) -> None:
    """Write `colors` as a file of the given kind."""
    image = Image.fromarray(colors())
    if kind == "exif":
        # Rotated to the left, with the EXIF orientation that rotates it back.
        exif = image.getexif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    elif kind == "16 bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    elif kind in ("I of 16 bit", "I of 32 bit"):
        factor = 257 if "16" in kind else 2**23
        Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * factor).save(path)
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
        ("I", "a.tiff", (81,) * 3, (83,) * 3),
        ("I of 16 bit", "a.tiff", (81,) * 3, (83,) * 3),
        ("I of 32 bit", "a.tiff", (81,) * 3, (83,) * 3),
    ],
)
def test_images_of_all_kinds_are_read_as_displayed(tmp_path, kind, name, top_left, bottom_right):
    save(tmp_path / name, kind)
    image = read_image_rgb(str(tmp_path / name))
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8
    # JPEG and palettes change colors a little.
    np.testing.assert_allclose(image[5, 5], top_left, atol=12)
    np.testing.assert_allclose(image[-5, -5], bottom_right, atol=12)


def test_corrupt_files_are_reported(tmp_path):
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
    # Missing files are kept, to be reported when they are read.
    assert expand_inputs([folder + "/no.jpg", folder + "/z*"]) == [
        folder + "/no.jpg",
        folder + "/z*",
    ]
    assert [is_video(path) for path in ("a.MP4", "a.jpg")] == [True, False]


def made(folder) -> list[str]:
    """Names of the output files in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def visualize_untrained(*arguments: object) -> int:
    """Run the command on an untrained model, and return its exit code."""
    return visualize.main(
        ["--config-file", CONFIG, *map(str, arguments)]
        + ["MODEL.NONLOCAL.POSITIONS", "('res4[-2]', 'mask_head[0]')"]
    )


@pytest.mark.slow
def test_files_that_cannot_be_drawn_are_skipped(tmp_path, capsys):
    inputs, output = tmp_path / "in", tmp_path / "new" / "out"
    inputs.mkdir()
    for name, kind in (("rgb.png", "RGB"), ("rgb.jpg", "RGB"), ("exif.jpg", "exif")):
        save(inputs / name, kind)
    (inputs / "broken.jpg").write_text("no")
    Image.new("RGB", (1, 1)).save(inputs / "pixel.png")
    options = ("--confidence-threshold", 0, "--max-detections", 2)
    options += ("--format", "png", "pdf", "--html")
    assert visualize_untrained("--input", inputs, "--output", output, *options) == 1
    stems = ("exif", "pixel", "rgb", "rgb-2")
    assert made(output) == sorted(
        f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf", "html")
    )
    printed, errors = capsys.readouterr()
    assert len([line for line in printed.splitlines() if line.startswith(str(output))]) == 12
    assert "skipped: " in errors and "broken.jpg' cannot be read as an image" in errors


def test_the_model_gets_images_as_in_training(tmp_path):
    """However they are displayed."""
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu"])
    given, mapper = [], DatasetMapper(cfg, is_train=False)
    visualizer = AttentionVisualizer(cfg, confidence_threshold=1.1)
    visualizer._predictor.model.register_forward_pre_hook(lambda _, args: given.extend(args[0]))
    kinds = {"RGB": "png", "exif": "jpg", "16 bit": "png", "transparent": "png", "I": "tiff"}
    for kind, ending in kinds.items():
        path = str(tmp_path / f"{kind}.{ending}")
        save(path, kind)
        visualizer.visualize(path, str(tmp_path / "out"))
        assert torch.equal(given.pop()["image"].byte(), mapper({"file_name": path})["image"])


def test_points_and_no_detection(tmp_path, capsys):
    save(tmp_path / "a.png", "RGB")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    files = ("--input", tmp_path / "a.png", tmp_path / "small.png", "--output", tmp_path / "out")
    # The point lies outside the second image.
    assert visualize_untrained(*files, "--point", "55,30", "--point", "1,1", "--html") == 1
    assert made(tmp_path / "out") == ["a.html", "a.png"]
    assert "The point (55, 30) lies outside: x goes from 0 to 20" in capsys.readouterr().err
    # No detection: the image alone.
    assert visualize_untrained(*files, "--confidence-threshold", 1.1) == 0
    assert made(tmp_path / "out") == ["a.html", "a.png", "small.png"]


def test_video_becomes_a_video(tmp_path):
    path, output = str(tmp_path / "clip.avi"), tmp_path / "out"
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 5, (60, 40))
    for _ in range(3):
        writer.write(colors()[:, :, ::-1])
    writer.release()
    arguments = ("--input", path, "--output", output, "--confidence-threshold", 0)
    assert visualize_untrained(*arguments) == 0
    frames, frame_rate = read_video(str(output / "clip.mp4"))
    shapes = [frame.shape for frame in frames]
    # The detections and two blocks, each 480 wide.
    assert shapes == [(320, 3 * 480, 3)] * 3 and frame_rate == 5


# Command, former option with its value, today's option, and the parsed value.
RENAMED_OPTIONS = [
    (visualize, ["--score", "0.25"], "--confidence-threshold", 0.25),
    (visualize, ["--count", "3"], "--max-detections", 3),
    (visualize, ["--arrows", "2"], "--num-arrows", 2),
    (visualize, ["--by-class"], "--color-by-class", True),
    (measure_attention, ["--images", "7"], "--num-images", 7),
    (measure_attention, ["--queries", "9"], "--num-queries", 9),
]


@pytest.mark.parametrize("command, old, new, value", RENAMED_OPTIONS)
def test_former_options_warn_with_the_new_name(command, old, new, value, capsys):
    required = ["--output", "out"] + (["--input", "a.png"] if command is visualize else [])
    with pytest.warns(FutureWarning, match=f"{old[0]} is now {new};"):
        args = command.parse_args([*required, *old])
    assert vars(args)[new[2:].replace("-", "_")] == value
    assert args == command.parse_args([*required, new, *old[1:]])
    with pytest.raises(SystemExit):
        command.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert new in printed and f" {old[0]} " not in printed


def test_former_argument_of_the_hook_warns(lamps):
    cfg = load_config(CONFIG)
    with pytest.warns(FutureWarning, match="pictures=.* is now num_images="):
        hook = AttentionHook(cfg, 10, pictures=1)
    cfg.DATASETS.TEST = (lamps,)
    hook.before_train()
    assert len(hook._samples) == 1


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
            "The model has no non-local blocks",
        ),
    ],
)
def test_wrong_arguments_end_with_one_sentence(tmp_path, arguments, message):
    save(tmp_path / "a.png", "RGB")
    files = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message):
        visualize.main(files + arguments)


def test_folder_that_cannot_be_written_ends_with_one_sentence(tmp_path):
    save(tmp_path / "a.png", "RGB")
    files = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.png" / "out")]
    with pytest.raises(SystemExit, match="error: .*a.png"):
        visualize.main(files)


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
    # Half on each of two of four keys: log 2 / log 4; signs and scale do not matter.
    assert relative_entropy(np.array([[3.0, -3.0, 0.0, 0.0]])) == pytest.approx(0.5)
    assert math.isnan(relative_entropy(np.zeros((2, 3))))
    assert math.isnan(relative_entropy(np.ones((2, 1))))


def test_mean_ignores_undefined_values():
    one, two = AttentionStats(1, math.nan, 2, 3, 4), AttentionStats(3, 5, 4, 3, 2)
    assert mean_stats([one, None, two]) == AttentionStats(2, 5, 3, 3, 3)
    assert mean_stats([None]) is None


def stats_of(block: nn.Module) -> AttentionStats:
    torch.manual_seed(0)
    with AttentionRecorder(nn.Sequential(block.eval())) as recorder:
        recorder._model(torch.randn(1, 8, 9, 12))
    return attention_stats(recorder, "0", num_queries=20)


def test_statistics_of_blocks_with_known_attention():
    block = NonLocalBlock(8, norm="")
    new = stats_of(block)
    # A freshly initialized block is the identity.
    assert new.residual_ratio == 0 and math.isnan(new.output_distance)
    assert 0 < new.att_distance < 0.5
    # The same query everywhere: one map, and one residual.
    nn.init.zeros_(block.theta.weight)
    nn.init.normal_(block.out.weight)
    same = stats_of(block)
    assert same.att_distance == pytest.approx(0, abs=1e-6)
    assert same.output_distance == pytest.approx(0, abs=1e-6)
    assert same.residual_ratio > 0
    assert same.input_distance == pytest.approx(new.input_distance)
    # Equal keys: a uniform map.
    nn.init.zeros_(block.phi.weight)
    assert stats_of(block).entropy == pytest.approx(1)


def test_command_measures_a_dataset(tmp_path, lamps, capsys):
    arguments = ["--config-file", CONFIG, "--dataset", lamps, "--num-images", "2"]
    blocks = "('res4[-2]', 'p4', 'mask_head[0]')"
    arguments += ["--output", str(tmp_path / "out"), "MODEL.NONLOCAL.POSITIONS", blocks]
    assert measure_attention.main(arguments) == 0
    with open(tmp_path / "out" / "attention.csv", newline="") as file:
        rows = {row["block"]: row for row in csv.DictReader(file)}
    assert "backbone.bottom_up.res4.nl0" in rows and "backbone.non_local.p4" in rows
    for row in rows.values():
        assert 0 <= float(row["att_distance"]) <= 0.5 and 0 <= float(row["entropy"]) <= 1
        assert float(row["residual_ratio"]) == 0
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "backbone.non_local.p4" in capsys.readouterr().out


def one_instance(class_id: int) -> Instances:
    return Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[5.0, 5, 25, 25]])),
        scores=torch.tensor([0.9]),
        pred_classes=torch.tensor([class_id]),
    )


def test_classes_without_a_name_have_their_number():
    for class_id, name in ((1, "two"), (2, "class 2")):
        (query,) = queries_from_instances(one_instance(class_id), ["one", "two"])
        assert query.label == f"1 {name} 90%"


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet"])
def test_names_are_those_of_as_many_classes_and_keypoints(architecture):
    cfg = load_config(CONFIG, ["MODEL.META_ARCHITECTURE", architecture])
    node = cfg.MODEL.RETINANET if architecture == "RetinaNet" else cfg.MODEL.ROI_HEADS
    cfg.DATASETS.TEST, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = ("lamps_val",), 17
    cfg.MODEL.KEYPOINT_ON = True
    for node.NUM_CLASSES, expected in ((3, ["amber", "teal", "violet"]), (2, None), (5, None)):
        assert matching_metadata(cfg).get("thing_classes") == expected
    cfg.DATASETS.TEST, node.NUM_CLASSES = ("keypoints_coco_2017_val",), 1
    metadata = matching_metadata(cfg)
    assert metadata.thing_classes == ["person"] and len(metadata.keypoint_names) == 17
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 18
    assert matching_metadata(cfg).get("keypoint_names") is None
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ()
    assert matching_metadata(cfg).get("thing_classes") is None


def test_model_of_more_classes_than_names_is_drawn(tmp_path, capsys):
    """Untrained, it predicts some of the classes that have no name."""
    save(tmp_path / "a.png", "RGB")
    files = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    options = ["--confidence-threshold", "0", "--color-by-class", "--config-file", CONFIG]
    assert visualize.main([*files, *options, "MODEL.ROI_HEADS.NUM_CLASSES", "90"]) == 0
    assert made(tmp_path / "out") == ["a.png"]


def test_influence_is_drawn_and_explored(tmp_path, capsys):
    save(tmp_path / "a.png", "RGB")
    output = tmp_path / "out"
    files = ["--input", tmp_path / "a.png", "--output", output, "--confidence-threshold", "0"]
    for _ in range(2):  # its own outputs are replaced
        more = ["--influence", "--html", "--max-detections", "2"]
        assert visualize_untrained(*files, *more) == 0
        assert made(output) == ["a.html", "a.influence.png", "a.png"]
    page = (output / "a.html").read_text()
    blocks = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])["blocks"]
    assert [block["influence"] is None for block in blocks] == [False, True]  # the second in a head
    for wrong, said in (
        (["--point", "5,5"], "leave out the points"),
        (["--block", "mask_head"], "a block outside of the heads, which is none here"),
    ):
        with pytest.raises(SystemExit, match=said):
            visualize_untrained(*files, "--influence", *wrong)


@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_the_inputs_of_a_predictor_are_those_of_its_calls(input_format):
    cfg = load_config(CONFIG, ["INPUT.FORMAT", input_format])
    predictor, given = Predictor(cfg), []
    predictor.model.forward = lambda inputs: given.extend(inputs) or [{}]
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    predictor(image)
    (expected,), (inputs,) = given, predictor.model_inputs(image)
    assert torch.equal(inputs["image"], expected["image"])
    assert (inputs["height"], inputs["width"]) == (expected["height"], expected["width"])
    assert inputs["image"].shape[1:] != (50, 70)


def test_commands_take_custom_datasets(tmp_path, capsys):
    """One is corrected: the image of a missing file is left out."""
    for name in {"custom_train", "custom_val"} & set(DatasetCatalog.list()):  # of another test
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    folder = str(tmp_path / "custom")
    write_dataset(folder, "val", 2)
    json_file, images = annotation_file(folder, "val"), image_root(folder, "val")
    os.remove(os.path.join(images, sorted(os.listdir(images))[0]))
    before = sorted(map(str, tmp_path.rglob("custom/**/*")))
    given = ["--config-file", CONFIG, "--val-json", json_file, "--val-images", images]
    given += ["--output", str(tmp_path / "out")]
    assert measure_attention.main([*given, "--num-queries", "2"]) == 0
    assert made(tmp_path / "out") == ["attention.csv", "attention.png"]
    image = os.path.join(images, sorted(os.listdir(images))[0])
    assert visualize.main([*given, "--input", image]) == 0
    assert MetadataCatalog.get("custom_val").thing_classes == ["amber", "teal", "violet"]
    DatasetCatalog.remove("custom_val")
    MetadataCatalog.remove("custom_val")
    assert sorted(map(str, tmp_path.rglob("custom/**/*"))) == before
    for wrong, message in (
        (["--val-images", images], "--val-images needs --val-json"),
        (["DATASETS.TEST", "('custom_train',)"], "pass --train-json"),
        (["DATASETS.TEST", "()", "DATASETS.TRAIN", "()"], "give --dataset or --val-json"),
    ):
        with pytest.raises(SystemExit, match=message):
            measure_attention.main(
                ["--output", str(tmp_path / "out"), "--config-file", CONFIG, *wrong]
            )


class Storage(EventStorage):
    """Keeps every scalar and image that is put into it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scalars, self.images = [], []

    def put_scalar(self, name, value, smoothing_hint=True, **options):
        self.scalars.append((self.iter, name, value))
        super().put_scalar(name, value, smoothing_hint, **options)

    def put_image(self, name, image):
        self.images.append((self.iter, name, image))


def train(cfg, monkeypatch, *hooks) -> tuple[dict, Storage]:
    """The weights after training, and the storage with everything written."""
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


@pytest.mark.slow
def test_hook_writes_and_does_not_affect_training(tmp_path, lamps, monkeypatch):
    cfg = load_config(CONFIG)
    cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = str(tmp_path), (lamps,), ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH = 3, 1
    cfg.TEST.EVAL_PERIOD = 0
    without, _ = train(cfg, monkeypatch)
    watched = cfg.clone()
    watched.DATASETS.TEST = (lamps,)
    weights, storage = train(cfg, monkeypatch, AttentionHook(watched, period=2, num_images=2))

    assert all(torch.equal(weights[name], value) for name, value in without.items())
    name = "attention/backbone.bottom_up.res4.nl0"
    assert [(step, image) for step, image, _ in storage.images] == [
        (step, f"{name}/{index}") for step in (1, 2) for index in (0, 1)
    ]
    panel = storage.images[0][2]
    assert panel.dtype == np.uint8 and panel.shape[0] == 3 and max(panel.shape) == 480
    written = {(step, key): value for step, key, value in storage.scalars if "attention" in key}
    tags = ("entropy", "residual_ratio", "att_distance", "output_weight_rms")
    keys = [f"{name}/{tag}" for tag in tags]
    assert sorted(written) == sorted((step, key) for step in (1, 2) for key in keys)
    # After two iterations the block has begun to learn.
    assert written[1, f"{name}/residual_ratio"] > 0 and written[1, f"{name}/output_weight_rms"] > 0


@pytest.mark.parametrize(
    "boxes, expected",
    [
        ([], (30, 20, None)),
        # The larger one reaches beyond the image, where its center is; x0, y0, width, height.
        ([(2, 4, 10, 10), (50, 10, 90, 20)], (55, 20, (50, 10, 60, 30))),
        ([(-90, -90, 95, 96)], (2.5, 3, (0, 0, 5, 6))),
        # No box is in the image.
        ([(70, 10, 20, 20), (5, 5, 0, 30)], (30, 20, None)),
    ],
)
def test_monitored_point_lies_in_the_image(boxes, expected):
    annotations = [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS} for box in boxes]
    query = _largest_object_query({"annotations": annotations}, colors())
    assert (*query.point, query.box) == expected


class TinyBackbone(Backbone):
    def __init__(self):
        super().__init__()
        self.block = NonLocalBlock(3)

    def forward(self, x):
        return self.block(x)


class TinyModel(nn.Module):
    """A model with a block, which fails if it is told to."""

    def __init__(self):
        super().__init__()
        self.backbone, self.failing = TinyBackbone(), False

    def forward(self, inputs):
        if self.failing:
            raise IndexError("of the model")
        return [self.backbone(each["image"][None].float()) for each in inputs]


def monitored(cfg, model, num_images: int = 3) -> tuple[AttentionHook, Storage]:
    """A hook that has written once, and what it wrote."""
    hook, storage = AttentionHook(cfg, 1, num_images), Storage(0)
    hook.trainer = SimpleNamespace(model=model, storage=storage, iter=0, max_iter=1)
    hook.before_train()
    hook.after_step()
    return hook, storage


@pytest.mark.slow
def test_monitoring_never_ends_a_run(lamps, caplog, monkeypatch):
    """Nor does it change the model's mode, or numpy's random numbers."""
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level(logging.WARNING)
    cfg, model = load_config(CONFIG, ["DATASETS.TEST", (lamps,)]), TinyModel()
    assert len(monitored(cfg, model)[1].images) == 3 and caplog.text == ""
    model.failing, state = True, np.random.get_state()[1].tolist()
    assert monitored(cfg, model)[1].images == [] and model.training
    assert "of iteration 1 cannot be monitored: IndexError: of the model." in caplog.text
    for name in ("()", "('no_such_dataset',)"):
        caplog.clear()
        hook, storage = monitored(load_config(CONFIG, ["DATASETS.TEST", name]), TinyModel())
        assert hook._samples == storage.images == storage.scalars == []
        assert "attention is to be monitored cannot be read: " in caplog.text
    assert np.random.get_state()[1].tolist() == state


@pytest.mark.parametrize("norm", ["", "BN"])
def test_output_weight_rms_is_zero_for_a_new_block_only(norm):
    block = NonLocalBlock(4, norm=norm)
    assert output_weight_rms(block) == 0
    nn.init.constant_(block.out.weight, -3.0)
    if norm:
        nn.init.constant_(block.norm.weight, 0.5)
    assert output_weight_rms(block) == pytest.approx(1.5 if norm else 3.0)
