"""The images to match: each tone has its own lamp, or none.

Mutations tried by hand; each makes at least one test here fail: the color of any lamp as the
category; shapes that are drawn again when colors are given; a lamp for every tone; a core of the
color of another lamp; a core up to the edge; shapes of all four tones in an image; lamps that keep
no distance; lamps and shapes of one tone as one class of tones_long.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nonlocal_det.data import LAMP_COLORS, Instance, Scene, image_rng, render_scene, write_dataset
from nonlocal_det.data.builtin import DATASETS
from nonlocal_det.data.lamps.paint import TONES

PARAMS = DATASETS["matches_long"].params
BY_TONE = DATASETS["tones_long"].params
UNLIT = 3  # a color, too
NUM_TONES = len(TONES)


def scenes(count: int, **kwargs) -> Iterator[Scene]:
    return (render_scene(image_rng(0, "test", index), PARAMS, **kwargs) for index in range(count))


def split(scene: Scene) -> tuple[list[Instance], list[Instance]]:
    """Shapes and lamps among the instances."""
    count = len(scene.instances) - len(scene.lamps)
    return scene.instances[:count], scene.instances[count:]


def pixel_centers(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return x, y


def painted_tone(scene: Scene, x: float, y: float) -> int:
    """The tone of a pixel, which it shows to within rounding."""
    contrast = np.abs(scene.image[int(y), int(x)] - np.array(tuple(TONES.values()))).max(axis=1)
    assert contrast.min() <= 1
    return int(contrast.argmin())


def tone_of_shape(scene: Scene, shape: Instance) -> int:
    y, x = np.argwhere(shape.mask).mean(axis=0)  # all outlines hold their centroid
    return painted_tone(scene, x, y)


def test_the_local_classes_of_the_same_images() -> None:
    names = BY_TONE.categories
    for index, scene in enumerate(scenes(30)):
        local = render_scene(image_rng(0, "test", index), BY_TONE)
        np.testing.assert_array_equal(local.image, scene.image)
        shapes, lamps = split(local)
        for shape in shapes:
            assert names[shape.category] == tuple(TONES)[tone_of_shape(local, shape)]
        for instance, lamp in zip(lamps, local.lamps):
            tone = tuple(TONES)[painted_tone(local, *lamp.center)]
            assert names[instance.category] == f"{tuple(LAMP_COLORS)[lamp.color]} {tone}"
        for a, b in zip(local.instances, scene.instances):
            np.testing.assert_array_equal(a.polygon, b.polygon)
            assert a.cue == b.cue


def test_an_object_has_the_color_of_the_lamp_with_its_tone() -> None:
    for scene in scenes(60):
        assert scene.image.shape == (64, 512, 3)
        color_of = {painted_tone(scene, *lamp.center): lamp.color for lamp in scene.lamps}
        cue_of = {painted_tone(scene, *lamp.center): lamp.center for lamp in scene.lamps}
        assert len(color_of) == len({*color_of.values()}) == len(scene.lamps)
        shapes, lamps = split(scene)
        assert 8 <= len(shapes) <= 10
        tones = [tone_of_shape(scene, shape) for shape in shapes]
        assert len({*tones} | {*color_of}) <= 3
        for shape, tone in zip(shapes, tones):
            assert shape.category == color_of.get(tone, UNLIT)
            assert shape.cue == cue_of.get(tone)
        for instance, lamp in zip(lamps, scene.lamps):
            assert instance.category == lamp.color
            np.testing.assert_array_equal(instance.polygon, lamp.polygon)
            assert instance.cue == lamp.center


def test_every_class_number_of_lamps_and_pair_occurs() -> None:
    """Expected of 300 images: 4.7 without a lamp, 56 of each pair, 675 shapes of each class."""
    categories, lamps, pairs = np.zeros(4), np.zeros(4), np.zeros((NUM_TONES, 3))
    for scene in scenes(300):
        lamps[len(scene.lamps)] += 1
        for lamp in scene.lamps:
            pairs[lamp.tone, lamp.color] += 1
        for shape in split(scene)[0]:
            categories[shape.category] += 1
    assert lamps.min() > 0
    assert 30 < pairs.min() <= pairs.max() < 85
    assert 0.2 < (categories / categories.sum()).min()


@pytest.mark.parametrize("index", range(10))
def test_colors_change_lamps_and_classes_alone(index: int) -> None:
    orders = list(itertools.permutations(range(3)))
    first, *others = (
        render_scene(image_rng(0, "test", index), PARAMS, colors=order) for order in orders
    )
    x, y = pixel_centers(first.image)
    far = np.ones(first.image.shape[:2], dtype=bool)
    for lamp in first.lamps:
        far &= np.hypot(x - lamp.center[0], y - lamp.center[1]) >= PARAMS.halo * lamp.radius
    sampled = render_scene(image_rng(0, "test", index), PARAMS)
    np.testing.assert_array_equal(sampled.image[far], first.image[far])
    for order, other in zip(orders[1:], others):
        np.testing.assert_array_equal(other.image[far], first.image[far])
        for a, b in zip(first.instances, other.instances):
            np.testing.assert_array_equal(a.polygon, b.polygon)
            assert a.cue == b.cue
            # The first order is 0, 1, 2: a color's place in it is the color.
            assert b.category == (*order, UNLIT)[a.category]
        for shape in split(first)[0]:
            assert far[shape.mask].all()
        for a, b in zip(first.lamps, other.lamps):
            distance = np.hypot(x - a.center[0], y - a.center[1])
            rim = (distance < a.radius - 1) & (distance > 0.7 * a.radius + 1)
            changed = (first.image[rim] != other.image[rim]).any(axis=-1)
            assert changed.all() == changed.any() == (a.color != b.color)


def test_a_lamp_shows_its_tone_and_its_color() -> None:
    """Its rim has the pure color; from its edge on, the glow fades, and ends before its reach."""
    for scene in scenes(20):
        x, y = pixel_centers(scene.image)
        for lamp in scene.lamps:
            color = np.array(tuple(LAMP_COLORS.values())[lamp.color])
            tone = np.array(tuple(TONES.values())[lamp.tone])
            distance = np.hypot(x - lamp.center[0], y - lamp.center[1])
            core = distance < 0.7 * lamp.radius - 0.8
            assert np.abs(scene.image[core] - tone).max() <= 1
            rim = (distance > 0.7 * lamp.radius + 0.8) & (distance < lamp.radius - 0.8)
            assert rim.any() and np.abs(scene.image[rim] - color).max() <= 1
            glow = (distance > lamp.radius + 1) & (distance < lamp.radius + 4)
            assert np.abs(scene.image[glow] - color).max(axis=-1).min() > 20


def test_lamps_keep_their_distance() -> None:
    for scene in scenes(60):
        for a, b in itertools.combinations(scene.lamps, 2):
            apart = math.dist(a.center, b.center)
            assert apart >= PARAMS.halo * (a.radius + b.radius) + PARAMS.gap
        masks = [instance.mask for instance in scene.instances]
        assert np.sum(masks, axis=0).max() == 1


@pytest.mark.parametrize("decided_by", ["match", "tone", "lamp", "outline"])
def test_narrower_images_have_room_too(decided_by: str) -> None:
    narrow = dataclasses.replace(
        PARAMS, width=(320, 320), num_shapes=(6, 7), shape_size=(20.0, 26.0), decided_by=decided_by
    )
    for index in range(60):
        scene = render_scene(image_rng(0, "test", index), narrow)
        assert scene.image.shape == (64, 320, 3)
        assert 6 <= len(split(scene)[0]) <= 7


@pytest.mark.parametrize("colors", [(0, 1), (0, 1, 1), (0, 1, 3), (0, 1, 2, 0), ()])
def test_colors_that_are_not_three_are_rejected(colors: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 different indices .*'amber'"):
        render_scene(image_rng(0, "test", 0), PARAMS, colors=colors)


def test_annotations_locate_the_lamp_of_each_object(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), "val", 20, params=PARAMS)
    content = json.loads((tmp_path / "annotations" / "instances_val.json").read_text())
    names = [c["name"] for c in content["categories"]]
    assert names == ["amber", "teal", "violet", "unlit"]
    objects = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        assert "cue_xy" not in image
        scene = render_scene(image_rng(*image["seed"]), PARAMS)
        # The lamps come last, each its own cue; so its distance is 0.
        lamps = objects[image["id"]][len(split(scene)[0]) :]
        assert image["cues"] == [lamp["cue_xy"] for lamp in lamps]
        cue_of = {lamp["category_id"]: lamp["cue_xy"] for lamp in lamps}
        assert [lamp["cue_distance"] for lamp in lamps] == [0] * len(lamps)
        for annotation in objects[image["id"]]:
            cue = cue_of.get(annotation["category_id"])
            assert annotation["cue_xy"] == cue
            x, y, width, height = annotation["bbox"]
            center = (x + width / 2, y + height / 2)
            expected = cue and pytest.approx(math.dist(center, cue), abs=0.03)
            assert annotation["cue_distance"] == expected
