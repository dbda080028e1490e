"""Positions: the syntax against Python's own indexing, and insertion into CNNs of other projects.

Mutations tried by hand; each makes at least one test here fail:
an index read as a slice of one; a block before its insertion point instead of after; inserting
while later positions are still unchecked; blocks that keep their own dtype or mode; an insertion
point used twice, in one call or in two; earlier blocks counted by an index; channels inferred from
the first inner layer.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nonlocal_det import NonLocalBlock, PositionError, insert_non_local
from nonlocal_det.modeling.positions import output_channels, parse_position

settings.register_profile("positions", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("positions")

INDEX = st.integers(-9, 9)
BOUND = st.none() | INDEX
NAMES = st.integers(1, 9).map(lambda n: [str(i) for i in range(n)])


def written(*parts):
    return ":".join("" if part is None else str(part) for part in parts)


@given(names=NAMES, index=INDEX)
def test_index_is_pythons(names, index):
    position = parse_position(f"res4[{index}]")
    if -len(names) <= index < len(names):
        assert position.select(names, "blocks") == [names[index]]
    else:
        with pytest.raises(PositionError, match=rf"res4 has {len(names)} blocks"):
            position.select(names, "blocks")


@given(names=NAMES, start=BOUND, stop=BOUND, step=BOUND)
def test_slice_is_pythons(names, start, stop, step):
    assume(step != 0)
    expected = names[start:stop:step]
    for text in {written(start, stop, step), *([written(start, stop)] if step is None else [])}:
        position = parse_position(f"res3[{text}]")
        if expected:
            assert position.select(names, "blocks") == expected
        else:
            with pytest.raises(PositionError, match="selects nothing"):
                position.select(names, "blocks")


@given(
    target=st.sampled_from(["res4", "p3", "mask_head", "layer3.4", "trunk_output.block1"]),
    index=st.sampled_from(["", "[0]", "[ -2 ]", "[1::2]", "[:]"]),
    values=st.dictionaries(
        st.sampled_from(["PAIRWISE", "REDUCTION", "SUBSAMPLE", "WINDOW_SIZE"]),
        st.sampled_from(["dot_product", 4, True, None, 0.5]),
    ),
)
def test_settings_are_read_as_python_values(target, index, values):
    text = " ".join([target + index, *(f"{key}={value}" for key, value in values.items())])
    position = parse_position(text)
    assert (position.text, position.target, position.settings) == (text, target, values)
    assert (position.index is None) == (index == "")


@given(st.text(max_size=12))
def test_any_text_is_a_position_or_one_error(text):
    try:
        position = parse_position(text)
    except PositionError as error:
        assert repr(text) in str(error) and "\n" not in str(error)
    else:
        assert position.target in text


@pytest.mark.parametrize(
    "text",
    ["", "res4[", "res4[]x", "res4[1,2]", "res4[a]", "res4[::0]", "res4[1:2:3:4]", "res4 [1]", 4]
    + ["res4[1] PAIRWISE", "res4[1] =2", "res4[1][2]", "res4[1.5]", None],
)
def test_invalid_syntax_gives_examples_of_valid_positions(text):
    with pytest.raises(PositionError, match=r"is not a position.*'res4\[-2\]'") as caught:
        parse_position(text)
    assert repr(text) in str(caught.value)


def make_block(channels, **settings):
    """A block that is the identity until its output convolution is not zero."""
    return NonLocalBlock(channels, norm="", **settings)


def seen(order, name):
    return lambda module, inputs, output: order.append(name)


def run_order(model, names, image):
    """The order in which the modules of these names run."""
    order = []
    hooks = [model.get_submodule(n).register_forward_hook(seen(order, n)) for n in names]
    model(image)
    for hook in hooks:
        hook.remove()
    return order


CNNS = {  # name: (model, positions, the children that the new blocks must follow)
    "resnet": (
        lambda: torchvision.models.resnet18(),
        ["layer3[-2]", "layer2[:]", "layer4.0"],
        ["layer3.0", "layer2.0", "layer2.1", "layer4.0"],
    ),
    "convnext": (
        lambda: torchvision.models.convnext_tiny(),
        ["features.3[1::2]", "features[0]"],
        ["features.3.1", "features.0"],
    ),
    "regnet": (
        lambda: torchvision.models.regnet_x_400mf(),
        ["trunk_output.block3[-2]", "trunk_output.block2", "stem[0]"],
        ["trunk_output.block3.block3-5", "trunk_output.block2", "stem.0"],
    ),
}


@pytest.fixture(scope="module", params=CNNS)
def inserted(request):
    """A CNN as it was, the same with blocks, their names, and what each must follow."""
    build, positions, followed = CNNS[request.param]
    torch.manual_seed(0)
    stock = build().eval()
    model = copy.deepcopy(stock)
    return stock, model, insert_non_local(model, positions, make_block), followed


def test_no_existing_name_changes(inserted):
    stock, model, names, followed = inserted
    assert len(names) == len(followed)
    old = [k for k in model.state_dict() if not k.startswith(tuple(f"{n}." for n in names))]
    assert old == list(stock.state_dict())
    assert len(old) < len(model.state_dict())
    for name in names:
        assert isinstance(model.get_submodule(name), NonLocalBlock)


def test_each_block_runs_right_after_what_it_follows(inserted):
    _, model, names, followed = inserted
    order = run_order(model, [*followed, *names], torch.zeros(1, 3, 32, 32))
    for name, child in zip(names, followed):
        assert order[order.index(child) + 1] == name


def test_outputs_are_equal_bit_for_bit_until_a_block_learns(inserted):
    stock, model, names, _ = inserted
    image = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = stock(image)
        assert torch.equal(model(image), expected)
        for name in names:
            changed = copy.deepcopy(model)
            nn.init.normal_(changed.get_submodule(name).out.weight, std=0.1)
            assert not torch.equal(changed(image), expected), name


def test_survives_copies_and_pickling(inserted):
    _, model, _, _ = inserted
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(image), model(image))


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1))
    )


def test_blocks_have_the_dtype_and_mode_of_their_neighbors():
    model = small().double().eval()
    insert_non_local(model, ["0", "1", "2"], lambda channels: NonLocalBlock(channels))
    blocks = [m for m in model.modules() if isinstance(m, NonLocalBlock)]
    # After the ReLU, which has no number of channels, there are those of the layer before it.
    assert [block.channels for block in blocks] == [8, 8, 4]
    assert {p.dtype for block in blocks for p in block.parameters()} == {torch.float64}
    assert not any(block.training for block in blocks)


def test_settings_of_a_position_reach_its_block():
    model = small()
    insert_non_local(model, ["0 inner_channels=3", "2[0] pairwise=dot_product"], make_block)
    blocks = [m for m in model.modules() if isinstance(m, NonLocalBlock)]
    assert [(b.pairwise, b.inner_channels) for b in blocks] == [
        ("embedded_gaussian", 3),
        ("dot_product", 3),
    ]


BAD = {  # positions: what the message must say
    "unknown target": (["layer9[0]"], "'layer9[0]'", "layer1, layer1.0.downsample"),
    "not in a sequence": (["conv1"], "'conv1'", "layer1"),
    "no index": (["layer3"], "'layer3'", "'layer3[-1]'"),
    "index too high": (["layer3[6]"], "'layer3[6]'", "from 0 to 5, or -1 to -6"),
    "empty slice": (["layer3[4:2]"], "'layer3[4:2]'", "6 blocks"),
    "twice": (["layer3[-2]", "layer3[4]"], "'layer3[4]'", "second block after 4 of layer3"),
    "twice by a slice": (
        ["layer3[0]", "layer3[::5]"],
        "'layer3[::5]'",
        "insertion point takes one",
    ),
    "unknown setting": (["layer3[0] color=red"], "'layer3[0] color=red'", "color"),
    "bad value": (["layer3[0] pairwise=cosine"], "'cosine'", "'dot_product'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_positions_say_what_and_where_and_change_nothing(case):
    positions, *said = BAD[case]
    model = torchvision.models.resnet50()
    # layer1 comes first: nothing may be inserted before all positions are known to be right.
    names = list(model.state_dict())
    with pytest.raises(PositionError) as caught:
        insert_non_local(model, ["layer1[0]", *positions], make_block)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message
    assert list(model.state_dict()) == names


def test_twice_in_two_calls_is_refused():
    model = torchvision.models.resnet18()
    insert_non_local(model, ["layer3[0]"], make_block)
    with pytest.raises(PositionError, match="second block"):
        insert_non_local(model, ["layer3.0"], make_block)
    # A second call counts as the first did: an index does not count blocks.
    assert insert_non_local(model, ["layer3[1]"], make_block) == ["layer3.nl1"]


CONCATENATING = {  # modules whose last convolution makes a part of their channels alone
    "densenet": (torchvision.models.densenet121, "features.denseblock2"),
    "squeezenet": (torchvision.models.squeezenet1_1, "features[4]"),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, "stage3[-2]"),
}


@pytest.mark.parametrize("name", CONCATENATING)
def test_channels_are_those_of_the_features(name):
    build, position = CONCATENATING[name]
    model, image = build().eval(), torch.randn(1, 3, 64, 64)
    statistics = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        before = model(image)
        (block,) = insert_non_local(model, [position], NonLocalBlock)
        assert torch.equal(model(image), before)
    left = [b for n, b in model.named_buffers() if not n.startswith(f"{block}.")]
    assert all(map(torch.equal, left, statistics))


class Indexing(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + x


def test_a_sequential_with_a_forward_of_its_own_is_refused():
    """Its children may be called in any way, or by an index that a block would shift."""
    model = nn.Sequential(Indexing(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), nn.ReLU())
    with pytest.raises(PositionError, match="'0' that runs its children one after the other"):
        insert_non_local(model, ["0[0]"], make_block)
    assert insert_non_local(model, ["0"], make_block) == ["nl0"]


def test_channels_that_cannot_be_inferred_are_an_error():
    with pytest.raises(PositionError, match="ReLU, Flatten"):
        output_channels([nn.ReLU(), nn.Flatten()])
