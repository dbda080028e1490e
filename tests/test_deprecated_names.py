"""Former names and values go on working for one release, with a warning that gives the new one.

Mutations tried by hand; each makes at least one test here fail: a former key not passed on; GROUPS
of "grouped" ignored; a former value or argument without a warning; a warning for a current name.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import ResNet, build_backbone

from nonlocal_det import add_nonlocal_config, layers, modeling
from nonlocal_det.layers import (
    CompactGeneralizedNonLocalBlock,
    NonLocalBase,
    NonLocalBlock,
    WindowedNonLocalBlock,
)
from nonlocal_det.modeling.block_factory import build_block, position_kwargs


def config():
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    return cfg


def block_of(cfg):
    """A block with the settings of a configuration, as a backbone would build it."""
    return position_kwargs(cfg)["make_block"](8)


def merged_from_list(settings, tmp_path):
    cfg = config()
    cfg.merge_from_list([p for k, v in settings.items() for p in (f"MODEL.NONLOCAL.{k}", str(v))])
    return cfg


def merged_from_file(settings, tmp_path):
    content = {"VERSION": 2, "MODEL": {"NONLOCAL": settings}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    cfg = config()
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    return cfg


def assigned(settings, tmp_path):
    cfg = config()
    for key, value in settings.items():
        setattr(cfg.MODEL.NONLOCAL, key, value)
    return cfg


EXPORTS = [  # package, former name, new name
    (layers, "GroupedNonLocalBlock", "WindowedNonLocalBlock"),
    (layers, "DisentangledBlock", "DisentangledNonLocalBlock"),
    (layers, "CompactGeneralizedBlock", "CompactGeneralizedNonLocalBlock"),
    (modeling, "block_maker", "nonlocal_block_factory"),
]
ARGUMENTS = [  # class, former arguments, new ones
    (WindowedNonLocalBlock, {"window": 3}, {"window_size": 3}),
    (WindowedNonLocalBlock, {"groups": 2}, {"num_heads": 2}),
    (CompactGeneralizedNonLocalBlock, {"kernel": "gaussian", "order": 2}, {"taylor_order": 2}),
    (NonLocalBlock, {"init": "he"}, {"init": "kaiming"}),
    (NonLocalBlock, {"init": "gaussian"}, {"init": "normal"}),
]
SETTINGS = [  # former settings of a block, new ones, a part of the warning
    (
        {"MECHANISM": "grouped", "GROUPS": 2},
        {"MECHANISM": "windowed", "NUM_HEADS": 2},
        "'windowed', with NUM_HEADS for GROUPS",
    ),
    (
        {"MECHANISM": "windowed", "WINDOW": 2},
        {"MECHANISM": "windowed", "WINDOW_SIZE": 2},
        "WINDOW is now MODEL.NONLOCAL.WINDOW_SIZE",
    ),
    (
        {"MECHANISM": "compact_generalized", "KERNEL": "gaussian", "ORDER": 2},
        {"MECHANISM": "compact_generalized", "KERNEL": "gaussian", "TAYLOR_ORDER": 2},
        "ORDER is now MODEL.NONLOCAL.TAYLOR_ORDER",
    ),
    ({"INIT": "he"}, {"INIT": "kaiming"}, "'he' is now 'kaiming'"),
    ({"INIT": "gaussian"}, {"INIT": "normal"}, "'gaussian' is now 'normal'"),
]


@pytest.fixture(autouse=True)
def same_weights(monkeypatch):
    """Blocks of the same settings get the same weights."""
    initialize = NonLocalBase.__init__

    def seeded(self, *args, **kwargs):
        torch.manual_seed(0)
        initialize(self, *args, **kwargs)

    monkeypatch.setattr(NonLocalBase, "__init__", seeded)


def assert_equal_blocks(one, other):
    """Same class, settings and weights."""
    settings = [
        {key: value for key, value in vars(block).items() if isinstance(value, (int, float, str))}
        for block in (one, other)
    ]
    assert type(one) is type(other) and settings[0] == settings[1]
    tensors, expected = one.state_dict(), other.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("package", "old", "new"), EXPORTS, ids=lambda part: str(part))
def test_exports(package, old, new):
    with pytest.warns(FutureWarning, match=f"{old} is now {new};"):
        assert getattr(package, old) is getattr(package, new)
    assert new in dir(package) and old not in dir(package)


@pytest.mark.parametrize(("block", "old", "new"), ARGUMENTS)
def test_arguments(block, old, new):
    (name,) = new
    with pytest.warns(FutureWarning, match=f" is now {name}=;| is now '{new[name]}'"):
        given = block(8, **old)
    kept = {key: value for key, value in old.items() if key == "kernel"}
    assert_equal_blocks(given, block(8, **kept, **new))


ways = pytest.mark.parametrize("way", [merged_from_list, merged_from_file, assigned])


@ways
@pytest.mark.parametrize(("old", "new", "said"), SETTINGS)
def test_settings_in_a_configuration(old, new, said, way, tmp_path):
    with pytest.warns(FutureWarning) as caught:
        given = block_of(way(old, tmp_path))
    assert any(said in str(warning.message) for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert_equal_blocks(given, block_of(way(new, tmp_path)))


@ways
def test_the_wrapped_backbone(way, tmp_path):
    cfg = way({"BACKBONE": "build_resnet_backbone", "POSITIONS": ("res4",)}, tmp_path)
    cfg.MODEL.BACKBONE.NAME = "build_nonlocal_backbone"
    with pytest.warns(FutureWarning, match="BACKBONE is now MODEL.NONLOCAL.WRAPPED_BACKBONE;"):
        model = build_backbone(cfg)
    assert isinstance(model, ResNet) and list(model.non_local) == ["res4"]


@pytest.mark.parametrize(("old", "new", "said"), SETTINGS)
def test_settings_of_a_position(old, new, said):
    with pytest.warns(FutureWarning) as caught:
        given = build_block(8, **old)
    assert any(said in str(warning.message) for warning in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert_equal_blocks(given, build_block(8, **new))


def test_groups_are_no_heads_under_the_new_name():
    assert build_block(8, MECHANISM="windowed", GROUPS=2).num_heads == 1


def test_upper_case_arguments_of_the_factory():
    with pytest.warns(FutureWarning, match=r"nonlocal_block_factory\(PAIRWISE=\) is now pairwise="):
        factory = modeling.nonlocal_block_factory(PAIRWISE="dot_product", norm="")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert factory(8).pairwise == "dot_product"
        # A position's own settings, in upper case, override those of the factory.
        assert factory(8, PAIRWISE="gaussian").pairwise == "gaussian"
    with pytest.raises(ValueError, match="A setting is 'pairwize'.*'pairwise'"):
        modeling.nonlocal_block_factory(pairwize="gaussian")(8)


def test_attention_method():
    block, x = NonLocalBlock(4), torch.randn(1, 4, 2, 3)
    with pytest.warns(FutureWarning, match="NonLocalBlock.attention is now attention_weights"):
        given = block.attention(x, torch.tensor([0]))
    assert torch.equal(given, block.attention_weights(x, torch.tensor([0])))
