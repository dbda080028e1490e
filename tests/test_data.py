"""The lamps dataset: the rendered images, the files, and how detectron2 reads them."""

import dataclasses
import importlib
import json
import math
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util
from tool_process import HANG

import nonlocal_det.data
from nonlocal_det.data import (
    LAMP_COLORS,
    LampsParams,
    ensure_dataset,
    image_rng,
    register_lamps,
    render_image,
    render_scene,
    write_dataset,
)
from nonlocal_det.data.builtin import DATASETS
from nonlocal_det.data.lamps import writer as lamps_coco
from nonlocal_det.data.lamps.raster import signed_distance

FEW = {"train": 3, "val": 2}


def _files(folder):
    """Return the bytes of every file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _read_json(path):
    return json.loads(path.read_text())


def _render(index, **kwargs):
    return render_image(image_rng(0, "test", index), **kwargs)


# ---- rendering


@pytest.mark.parametrize("index", range(20))
def test_category_does_not_show_in_the_objects(index):
    images, instances, lamps = zip(*(_render(index, color=c) for c in range(len(LAMP_COLORS))))
    reach = LampsParams().halo * lamps[0].radius
    y, x = np.mgrid[: images[0].shape[0], : images[0].shape[1]] + 0.5
    far = np.hypot(x - lamps[0].center[0], y - lamps[0].center[1]) >= reach
    in_lamp = np.hypot(x - lamps[0].center[0], y - lamps[0].center[1]) < lamps[0].radius - 1
    for category in (1, 2):
        np.testing.assert_array_equal(images[category][far], images[0][far])
        # The lamp itself differs, everywhere: the cue is there.
        assert (images[category][in_lamp] != images[0][in_lamp]).any(axis=-1).all()
        for a, b in zip(instances[0], instances[category]):
            np.testing.assert_array_equal(a.mask, b.mask)
            np.testing.assert_array_equal(a.polygon, b.polygon)
            assert far[a.mask].all()
            assert (a.category, b.category) == (0, category)


def test_lamp_and_categories_agree_and_all_occur():
    seen = []
    for index in range(60):
        image, instances, lamp = _render(index)
        seen.append(lamp.color)
        assert {instance.category for instance in instances} == {lamp.color}
        # The rim's color: outside the highlight, yet inside the edge.
        x, y = lamp.center[0] + 0.85 * lamp.radius, lamp.center[1]
        rim = image[int(y), int(x)].astype(int)
        distances = [np.abs(rim - color).sum() for color in LAMP_COLORS.values()]
        assert np.argmin(distances) == lamp.color
    # 60 samples of 3 categories: each has 20 on average, and fewer than 8 once in a thousand times.
    assert min(seen.count(category) for category in range(3)) >= 8


def test_masks_are_disjoint_and_show_one_flat_color():
    for index in range(20):
        image, instances, _ = _render(index)
        assert np.sum([instance.mask for instance in instances], axis=0).max() == 1
        for instance in instances:
            # Flat except for the edge: nothing is painted over a shape.
            colors, counts = np.unique(image[instance.mask], axis=0, return_counts=True)
            assert counts.max() > 0.7 * counts.sum(), (index, colors, counts)


def test_signed_distance_of_a_notched_square():
    # A square from (0, 0) to (4, 4) whose top has a notch down to (2, 2).
    polygon = np.array([[0, 0], [2, 2], [4, 0], [4, 4], [0, 4]], dtype=float)
    cases = [
        ((2.0, 3.0), -1.0),  # inside, midway between the bottom and the tip of the notch
        ((2.0, 1.0), math.sqrt(0.5)),  # in the notch, at equal distance from its two sides
        ((6.0, 2.0), 2.0),  # right of an edge
        ((-3.0, -4.0), 5.0),  # off a corner
    ]
    for (x, y), expected in cases:
        for outline in (polygon, polygon[::-1]):
            distance = signed_distance(np.array([x]), np.array([y]), outline)
            np.testing.assert_allclose(distance, expected, err_msg=f"at {x, y}")


def test_params_bound_the_image():
    params = LampsParams(side=(200, 240), num_shapes=(6, 7), shape_size=(30, 40))
    for index in range(5):
        image, instances, lamp = _render(index, params=params)
        assert all(200 <= side <= 240 for side in image.shape[:2])
        assert 6 <= len(instances) <= 7
        assert params.lamp_size[0] <= 2 * lamp.radius <= params.lamp_size[1]
        for instance in instances:
            across = instance.polygon.max(axis=0) - instance.polygon.min(axis=0)
            assert 20 < across.max() <= 40 + 1e-9


@pytest.mark.parametrize(
    "change, message",
    [
        ({"side": (160, 112)}, "side"),  # high below low
        ({"num_shapes": (0, 3)}, "num_shapes"),  # an image without shapes
        ({"halo": 0.5}, "halo"),  # glow smaller than its lamp
        ({"gap": 0.0}, "gap"),  # edges of neighbors would mix
    ],
)
def test_bad_params_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        LampsParams(**change)


def test_impossible_images_are_rejected():
    with pytest.raises(ValueError, match="found no room for 40 shapes"):
        _render(0, params=LampsParams(num_shapes=(40, 40)))
    with pytest.raises(ValueError, match="amber"):
        _render(0, color=3)
    with pytest.raises(ValueError, match="use render_scene"):
        _render(0, params=LampsParams(decided_by="match"))


# ---- the files


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_dataset(str(tmp_path / name), "val", 4, seed=seed)
    a, b, c = (_files(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)


def test_more_images_or_another_split_leave_the_first_unchanged(tmp_path):
    write_dataset(str(tmp_path / "few"), "val", 2)
    write_dataset(str(tmp_path / "many"), "val", 4)
    write_dataset(str(tmp_path / "many"), "train", 2)
    few, many = _files(tmp_path / "few"), _files(tmp_path / "many")
    for name in ("000001.png", "000002.png"):
        assert few[f"val/{name}"] == many[f"val/{name}"] != many[f"train/{name}"]
    first, second = (json.loads(files["annotations/instances_val.json"]) for files in (few, many))
    assert first["images"] == second["images"][:2]
    assert first["annotations"] == second["annotations"][: len(first["annotations"])]


def test_annotations_describe_the_images(tmp_path):
    write_dataset(str(tmp_path), "val", 30, seed=5)
    content = _read_json(tmp_path / "annotations" / "instances_val.json")
    by_image = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) == 1
    assert [c["id"] for c in content["categories"]] == [1, 2, 3]

    ious = []
    for image in content["images"]:
        size = image["height"], image["width"]
        # The recorded seed alone is enough to render the image again.
        rendered, instances, lamp = render_image(image_rng(*image["seed"]))
        stored = Image.open(tmp_path / "val" / image["file_name"])
        np.testing.assert_array_equal(np.asarray(stored), rendered)
        assert rendered.shape == (*size, 3)
        assert image["cue_xy"] == pytest.approx(lamp.center, abs=0.006)
        assert 2 <= len(by_image[image["id"]]) == len(instances) <= 5

        for annotation, instance in zip(by_image[image["id"]], instances):
            assert annotation["category_id"] == instance.category + 1 == lamp.color + 1
            rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], *size))
            decoded = mask_util.decode(rle).astype(bool)
            ious.append((decoded & instance.mask).sum() / (decoded | instance.mask).sum())
            assert annotation["area"] == pytest.approx(instance.mask.sum(), rel=0.03)

            x, y, width, height = annotation["bbox"]
            assert x >= 1 and y >= 1 and x + width <= size[1] - 1 and y + height <= size[0] - 1
            assert 20 <= max(width, height) <= 56
            # The tightest box of whole pixels differs by less than a pixel on each side.
            rows, columns = np.nonzero(instance.mask)
            tight = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.subtract((x, y, x + width, y + height), tight)).max() < 1
            distance = math.hypot(
                x + width / 2 - image["cue_xy"][0], y + height / 2 - image["cue_xy"][1]
            )
            assert annotation["cue_distance"] == pytest.approx(distance, abs=0.03)
    assert min(ious) > 0.95
    # 0.99 where the two agree; polygons half a pixel off would have 0.93.
    assert np.mean(ious) > 0.98


def test_annotations_hold_no_path_and_no_date(tmp_path):
    write_dataset(str(tmp_path), "val", 1)
    text = (tmp_path / "annotations" / "instances_val.json").read_text()
    assert str(tmp_path) not in text
    assert not {"year", "date_created"} & json.loads(text)["info"].keys()


# ---- writing on the first use


def test_the_dataset_appears_complete_and_once(tmp_path, monkeypatch):
    folder = tmp_path / "lamps"
    (tmp_path / ".lamps-killed" / "lamps" / "train").mkdir(parents=True)  # left by a killed process
    ensure_dataset(str(folder), FEW)
    written = _files(folder)
    assert len(written) == 3 + 2 + 2
    assert sorted(os.listdir(tmp_path)) == [".lamps-killed", "lamps"]
    # A folder that only its owner may enter would be of no use to others.
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask

    monkeypatch.setattr(lamps_coco, "write_dataset", _fail)
    ensure_dataset(str(folder), FEW)
    assert _files(folder) == written


def _fail(*args, **kwargs):
    raise AssertionError("nothing was to be written")


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "lamps").mkdir()
    ensure_dataset(str(tmp_path / "lamps"), FEW)
    assert len(_files(tmp_path / "lamps")) == 7


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path, monkeypatch):
    folder = tmp_path / "lamps"

    def write_train_then_die(path, split, *args, **kwargs):
        if split == "val":
            os._exit(1)
        write_dataset(path, split, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(lamps_coco, "write_dataset", write_train_then_die)
        _join([_fork(ensure_dataset, str(folder), FEW)], exit_code=1)
    assert not folder.exists()
    ensure_dataset(str(folder), FEW)
    assert len(_files(folder)) == 7


def test_a_writer_that_comes_second_takes_what_is_there(tmp_path, monkeypatch):
    folder = tmp_path / "lamps"

    def be_overtaken(*args, **kwargs):
        write_dataset(*args, **kwargs)
        monkeypatch.setattr(lamps_coco, "write_dataset", write_dataset)
        ensure_dataset(str(folder), FEW)

    monkeypatch.setattr(lamps_coco, "write_dataset", be_overtaken)
    ensure_dataset(str(folder), FEW)
    assert len(_files(folder)) == 7
    assert os.listdir(tmp_path) == ["lamps"]


def test_processes_at_once_end_with_one_dataset(tmp_path):
    folder = tmp_path / "lamps"
    barrier = multiprocessing.get_context("fork").Barrier(4)
    _join([_fork(_meet_and_ensure, barrier, str(folder)) for _ in range(4)], exit_code=0)
    ensure_dataset(str(tmp_path / "alone"), FEW)
    assert _files(folder) == _files(tmp_path / "alone")
    assert sorted(os.listdir(tmp_path)) == ["alone", "lamps"]


def _meet_and_ensure(barrier, folder):
    barrier.wait()
    ensure_dataset(folder, FEW)


def _fork(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def _join(processes, exit_code):
    for process in processes:
        process.join(timeout=HANG)
    assert [process.exitcode for process in processes] == [exit_code] * len(processes)


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},  # other images
        {"splits": {"train": 4, "val": 2}},  # more of them
        {"splits": {"train": 3, "val": 2, "test": 1}},  # a split that is not there
        {"params": LampsParams(halo=2.0)},  # other parameters
    ],
)
def test_another_dataset_is_neither_used_nor_overwritten(tmp_path, settings):
    folder = tmp_path / "lamps"
    ensure_dataset(str(folder), FEW)
    before = _files(folder)
    with pytest.raises(FileExistsError, match="delete it.*DETECTRON2_DATASETS") as caught:
        ensure_dataset(str(folder), **{"splits": FEW, **settings})
    assert str(folder) in str(caught.value)
    assert _files(folder) == before


def test_other_generator_version_or_damaged_files_are_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "lamps"
    ensure_dataset(str(folder), FEW)
    with monkeypatch.context() as patch:
        patch.setattr(lamps_coco, "GENERATOR_VERSION", -1)
        with pytest.raises(FileExistsError):
            ensure_dataset(str(folder), FEW)
    path = folder / "annotations" / "instances_val.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(FileExistsError):
        ensure_dataset(str(folder), FEW)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    # Permissions do not bind every user; a path below a file does.
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "lamps"
    with pytest.raises(OSError, match="Cannot write.*DETECTRON2_DATASETS") as caught:
        ensure_dataset(str(folder), FEW)
    assert str(folder) in str(caught.value)
    with pytest.raises(FileExistsError, match="DETECTRON2_DATASETS"):
        ensure_dataset(str(tmp_path / "file"), FEW)
    assert os.listdir(tmp_path) == ["file"]


# ---- detectron2


@pytest.fixture
def registered(tmp_path):
    register_lamps(str(tmp_path))
    yield tmp_path
    register_lamps()


@pytest.fixture(scope="module")
def written_root(tmp_path_factory):
    """A registered root with the complete dataset, generated once."""
    root = tmp_path_factory.mktemp("root")
    register_lamps(str(root))
    ensure_dataset(str(root / "lamps"))
    yield root
    register_lamps()


@pytest.fixture
def few(monkeypatch):
    """Let the registered dataset have few images."""
    monkeypatch.setattr(
        nonlocal_det.data.builtin,
        "ensure_dataset",
        lambda folder, splits, params: ensure_dataset(folder, FEW, params=params),
    )


def test_registering_writes_nothing_and_may_be_repeated(registered):
    importlib.reload(nonlocal_det.data)
    register_lamps(str(registered))
    register_lamps(str(registered))
    assert {"lamps_train", "lamps_val"} <= set(DatasetCatalog.list())
    metadata = MetadataCatalog.get("lamps_val")
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == list(LAMP_COLORS)
    assert len(metadata.thing_colors) == len(LAMP_COLORS)
    assert metadata.image_root == str(registered / "lamps" / "val")
    assert os.listdir(registered) == []


def test_root_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/somewhere")
    register_lamps()
    expected = os.path.expanduser("~/somewhere/lamps/annotations/instances_val.json")
    assert MetadataCatalog.get("lamps_val").json_file == expected
    monkeypatch.delenv("DETECTRON2_DATASETS")
    register_lamps()
    expected = os.path.join("datasets", "lamps", "annotations", "instances_val.json")
    assert MetadataCatalog.get("lamps_val").json_file == expected


@pytest.mark.parametrize(
    "first_use",
    [
        lambda: DatasetCatalog.get("lamps_train"),  # the loader
        lambda: COCOEvaluator("lamps_val", output_dir=None),  # an evaluator built before it
    ],
)
def test_first_use_writes_both_splits(registered, few, first_use):
    first_use()
    assert len(_files(registered / "lamps")) == 7
    for split, count in FEW.items():
        assert len(DatasetCatalog.get(f"lamps_{split}")) == count


def test_the_control_has_the_same_images_with_other_categories(registered, few):
    for name in ("lamps_long_val", "outlines_long_val"):
        DatasetCatalog.get(name)
    lamps, outlines = (_files(registered / name) for name in ("lamps_long", "outlines_long"))
    for name in lamps:
        assert (lamps[name] == outlines[name]) == name.endswith(".png"), name
    records = DatasetCatalog.get("lamps_long_val"), DatasetCatalog.get("outlines_long_val")
    for lamp, outline in zip(*records):
        assert (lamp["height"], lamp["width"]) == (64, 512)
        for a, b in zip(lamp["annotations"], outline["annotations"]):
            assert a["bbox"] == b["bbox"] and a["segmentation"] == b["segmentation"]
    assert MetadataCatalog.get("outlines_long_val").thing_classes == ["round", "pointed", "square"]


def test_outlines_decide_the_category_of_the_control():
    """Corners of the polygon: a category has its own numbers of them, and all categories occur."""
    params = DATASETS["outlines_long"].params
    corners = {0: set(), 1: set(), 2: set()}
    for index in range(60):
        for instance in _render(index, params=params)[1]:
            corners[instance.category].add(len(instance.polygon))
    assert corners == {0: {40, 30}, 1: {15, 50}, 2: {20, 60}}


def test_the_lamp_is_the_last_object_if_annotated():
    for name in ("lamps_long", "outlines_long"):
        image, instances, lamp = _render(3, params=DATASETS[name].params)
        assert instances[-1].category == (lamp.color if name == "lamps_long" else 0)
        y, x = np.nonzero(instances[-1].mask)
        assert (x.mean() + 0.5, y.mean() + 0.5) == pytest.approx(lamp.center, abs=0.1)
        assert len(x) == pytest.approx(math.pi * lamp.radius**2, rel=0.03)
        annotation = lamps_coco._annotation(instances[-1], several=False)
        assert annotation["cue_distance"] < 0.05
    without = dataclasses.replace(DATASETS["lamps_long"].params, lamp_counts=False)
    same, fewer, _ = _render(3, params=without)
    assert (same == image).all() and len(fewer) == len(instances) - 1


def test_a_quarter_of_the_images_is_unlit(tmp_path):
    """Their shapes are of a class of their own; the others are those of the lamp's color."""
    params = DATASETS["unlit_long"].params
    unlit = 0
    for index in range(200):
        scene = render_scene(image_rng(0, "test", index), params)
        (lamp,) = scene.lamps or [None]
        unlit += lamp is None
        category = 3 if lamp is None else lamp.color
        cue = None if lamp is None else lamp.center
        assert {(i.category, i.cue) for i in scene.instances} == {(category, cue)}
        assert len(scene.instances) - len(scene.lamps) in (4, 5, 6)
    assert 30 <= unlit <= 70  # of 200 by chance: 50, give or take three standard deviations
    assert params.categories[3] == "unlit"
    with pytest.raises(ValueError, match="render_scene for decided_by='lamp or unlit'"):
        _render(0, params=params)

    write_dataset(str(tmp_path), "val", 20, params=params)
    content = json.loads(Path(lamps_coco.annotation_file(str(tmp_path), "val")).read_text())
    numbers = {len(image["cues"]) for image in content["images"]}
    assert numbers == {0, 1}
    cues = {image["id"]: image["cues"] for image in content["images"]}
    for annotation in content["annotations"]:
        (cue,) = cues[annotation["image_id"]] or [None]
        assert annotation["cue_xy"] == cue
        assert (annotation["cue_distance"] is None) == (cue is None)
    assert lamps_coco.read_params(lamps_coco.annotation_file(str(tmp_path), "val")) == params


@pytest.mark.slow
def test_loader_reads_the_complete_dataset(written_root):
    for split, count in (("train", 400), ("val", 100)):
        dicts = DatasetCatalog.get(f"lamps_{split}")
        assert len(dicts) == count
        assert all(os.path.isfile(record["file_name"]) for record in dicts)
        assert any(record["height"] > record["width"] for record in dicts)
        assert any(record["height"] < record["width"] for record in dicts)
        categories = [a["category_id"] for record in dicts for a in record["annotations"]]
        # A third each, give or take: none is so rare that a guess would do.
        assert np.bincount(categories, minlength=3).min() > 0.2 * len(categories)


def test_ground_truth_scores_100(written_root):
    DatasetCatalog.get("lamps_val")  # detectron2 maps category ids to classes when it loads them
    evaluator = COCOEvaluator("lamps_val", distributed=False, output_dir=None)
    evaluator.reset()
    content = _read_json(written_root / "lamps" / "annotations" / "instances_val.json")
    for image in content["images"]:
        _, instances, _ = render_image(image_rng(*image["seed"]))
        output = Instances((image["height"], image["width"]))
        corners = [(*i.polygon.min(axis=0), *i.polygon.max(axis=0)) for i in instances]
        output.pred_boxes = Boxes(torch.tensor(corners))
        output.pred_classes = torch.tensor([i.category for i in instances])
        output.pred_masks = torch.from_numpy(np.stack([i.mask for i in instances]))
        output.scores = torch.ones(len(instances))
        evaluator.process([{"image_id": image["id"]}], [{"instances": output}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
