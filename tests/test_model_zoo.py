"""The model zoo: every configuration by its name, and what a wrong name or wish is told.

Mutations tried by hand; each makes at least one test here fail: names that may climb out of the
zoo; names before files of the working directory; the farthest names for the nearest; a zoo without
LazyConfigs; `get` without loading weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import blocks_of

from nonlocal_det import model_zoo
from nonlocal_det.config import load_config, load_lazy_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"


def test_every_configuration_has_its_name() -> None:
    files = [*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.py")]
    assert model_zoo.zoo_names() == sorted(str(file.relative_to(CONFIGS)) for file in files)
    for name in model_zoo.zoo_names():
        assert Path(model_zoo.get_config_file(name)).samefile(CONFIGS / name)


@pytest.mark.parametrize("name", ["mask_rcnn_R50_NL.yaml", "mask_rcnn_R50_NL"])
def test_a_yaml_file_with_its_bases(name: str) -> None:
    cfg = model_zoo.get_config(name)
    assert cfg == load_config(str(CONFIGS / "mask_rcnn_R50_NL.yaml"))
    assert cfg.MODEL.NONLOCAL.POSITIONS == ("res4[-2]",)


@pytest.mark.parametrize("name", ["lazy/mask_rcnn_R101_NL.py", "lazy/mask_rcnn_R101_NL"])
def test_a_lazy_configuration_with_its_imports(name: str) -> None:
    assert model_zoo.get_config(name).model.backbone.bottom_up.stages.depth == 101


def test_commands_take_names_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("mask_rcnn_R50_NL10") == model_zoo.get_config("mask_rcnn_R50_NL10.yaml")
    lazy = load_lazy_config("lazy/mask_rcnn_R101_NL", ["train.max_iter=7"])
    assert (lazy.train.max_iter, lazy.model.backbone.bottom_up.stages.depth) == (7, 101)


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mask_rcnn_R50_NL.yaml").write_text(yaml.safe_dump({"SEED": 17}))
    assert load_config("mask_rcnn_R50_NL.yaml").SEED == 17
    assert model_zoo.get_config("mask_rcnn_R50_NL.yaml").SEED == -1


@pytest.mark.parametrize("name", ["mask_rcn_R101_NL5.yaml", "configs/mask_rcnn_R101_NL5.yml"])
def test_an_unknown_name_is_told_the_nearest(name: str) -> None:
    for find in (model_zoo.get_config_file, model_zoo.get_config, model_zoo.get, load_config):
        with pytest.raises(FileNotFoundError, match=r"mask_rcnn_R101_NL5\.yaml") as caught:
            find(name)
        assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../config.py", str(CONFIGS / "mask_rcnn_R50_NL.yaml"), ""])
def test_the_zoo_holds_only_its_own(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="model zoo has no configuration"):
        model_zoo.get_config_file(name)


@pytest.mark.parametrize("name", ["mask_rcnn_R50_NL", "lazy/mask_rcnn_R50_NL"])
def test_trained_weights_are_not_published(name: str) -> None:
    for get in (model_zoo.get_config, model_zoo.get):
        with pytest.raises(ValueError, match=r"^No trained weights of .* use trained=False"):
            get(name, trained=True)


def test_a_model_in_training_mode() -> None:
    """The demo's, the one configuration whose weights need no download."""
    model = model_zoo.get("lamps_mask_rcnn_R18_NL", device="cpu")
    assert model.training and list(blocks_of(model)) == ["backbone.bottom_up.res4.nl0"]
    assert model.device == torch.device("cpu")


def test_a_model_starts_from_the_weights_of_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_zoo.get("lamps_mask_rcnn_R18_NL", device="cpu")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    cfg = model_zoo.get_config("lamps_mask_rcnn_R18_NL")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    monkeypatch.setattr(model_zoo, "get_config", lambda name, trained: cfg)
    same = model_zoo.get("lamps_mask_rcnn_R18_NL", device="cpu").state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
