"""``nonlocal-det analyze``: counts against arithmetic by hand, and against the stock model's own.

Mutations tried by hand; each makes at least one test here fail: counting the zeros that pad values;
counting queries twice and values never; prefix sums left out; a baseline with the blocks' share.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from tiny_models import NARROW, STOCK, blocks_of, renamed
from tool_process import run_tool
from torch import nn

from nonlocal_det.benchmark import flops
from nonlocal_det.benchmark.initial_attention import _take_statistics, initial_weights
from nonlocal_det.cli.analyze import main, parse_args
from nonlocal_det.config import load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs" / "mask_rcnn_R50_NL.yaml")
# res4 of a narrow ResNet has 128 channels; 64 x 96 pixels are 4 x 6 positions there.
C, D, N = 128, 64, 24
FEW = ["MODEL.RPN.POST_NMS_TOPK_TEST", 7, "TEST.DETECTIONS_PER_IMAGE", 3]
SMALL = [str(option) for option in (*NARROW, *FEW)]
CONVOLUTION = N * C * D


def analyze(*options):
    model = flops.build_for_analysis(CONFIG, [*SMALL, *options])
    return model, flops.analyze(model, (64, 96))


# By hand: theta and out for every position, phi and g for every key, of which there are 2 x 3.
EMBEDDINGS = (2 + 2 / 4) * CONVOLUTION
BY_HAND = {
    "embedded_gaussian": ((), EMBEDDINGS + N * 6 * (D + D)),
    "all keys": (("SUBSAMPLE", "False"), 4 * CONVOLUTION + N * N * (D + D)),
    # Every position is embedded, and then pooled.
    "pooled last": (("POOL_FIRST", "False"), 4 * CONVOLUTION + N * 6 * (D + D)),
    # The Gaussian compares all channels and embeds but the values.
    "gaussian": (("PAIRWISE", "gaussian"), (1 + 1 / 4) * CONVOLUTION + N * 6 * (C + D)),
    # g phi^T, once for all queries, and that with theta.
    "dot_product": (("PAIRWISE", "dot_product"), EMBEDDINGS + D * D * (6 + N)),
    # Two prefix sums over the keys of each channel, one slope times rise for each query.
    "concatenation": (("PAIRWISE", "concatenation"), EMBEDDINGS + 2 * 6 * D + N * D),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_block_by_hand(case):
    options, expected = BY_HAND[case]
    if options:
        options = (f"MODEL.NONLOCAL.{options[0]}", options[1])
    _, found = analyze(*options)
    (block,) = found["blocks"].values()
    assert block["flops"] == expected
    embedded = 1 if case == "gaussian" else 3
    # The vector w_f; the factor of the cosines.
    others = {"concatenation": 2 * D, "dot_product": 0}.get(case, 1)
    assert block["parameters"] == embedded * (C * D + D) + D * C + C + others


@pytest.mark.slow
def test_without_blocks_it_is_the_stock_model():
    model, found = analyze("MODEL.NONLOCAL.POSITIONS", "('res3[:]', 'p2', 'mask_head[-1]')")
    assert list(found["blocks"]) == list(blocks_of(model))
    cfg = load_config(CONFIG, [*SMALL, "MODEL.DEVICE", "cpu"])
    cfg.MODEL.RPN.NMS_THRESH = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1.0
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    stock = build_model(renamed(cfg, STOCK))
    assert found["baseline"] == flops.analyze(stock, (64, 96))["total"]
    # The block of the mask head sees every object.
    head = found["blocks"]["roi_heads.mask_head.nl_mask_fcn4"]["flops"]
    assert head == 3 * (2 * (196 + 49) * 32 * 16 + 196 * 49 * (16 + 16))


def test_the_command(tmp_path, capsys):
    path = tmp_path / "found.json"
    main(["--config-file", CONFIG, "--size", "64", "96", "--output-json", str(path), *SMALL])
    found = json.loads(path.read_text())
    assert found["config"] == CONFIG and found["size"] == [64, 96]
    printed = capsys.readouterr().out
    assert "backbone.bottom_up.res4.nl4" in printed and "with blocks" in printed
    share = found["blocks"]["backbone.bottom_up.res4.nl4"]["flops"] / found["baseline"]["flops"]
    assert f"{share:.2%}" in printed
    assert found["total"]["flops"] == found["baseline"]["flops"] + sum(
        block["flops"] for block in found["blocks"].values()
    )


LAZY = str(ROOT / "configs" / "lazy" / "mask_rcnn_R50_NL.py")
MIXED = "('res3[0] MECHANISM=global_context', 'res4[-2] SCALE=True', 'p3 PAIRWISE=dot_product')"


def test_attention_on_an_image(tmp_path, capsys):
    """With random weights and with a file's, whose attention is uniform here."""
    image, path, weights = (str(tmp_path / name) for name in ("i.png", "found.json", "w.pth"))
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)
    Image.fromarray(noise).save(image)
    given = ["--config-file", CONFIG, "--size", "64", "96", "--output-json", path, *SMALL]
    given += ["MODEL.NONLOCAL.POSITIONS", MIXED]
    torch.manual_seed(0)
    main([*given, "--image", image])
    printed = capsys.readouterr().out
    names = ["backbone.bottom_up.res3.nl0", "backbone.bottom_up.res4.nl4"]
    for name in names:
        measured = json.loads(Path(path).read_text())["attention"][name]
        assert 0 < measured["entropy"] < 0.999 and 0 < measured["max_weight"] <= 1
        assert f"{measured['entropy']:.3f}" in printed
    assert f"{image}, with random weights" in printed

    model = flops.build_for_analysis(CONFIG, given[7:])
    for block in blocks_of(model).values():
        nn.init.zeros_(getattr(block, "w_k", getattr(block, "theta", None)).weight)
    torch.save({"model": model.state_dict()}, weights)
    main([*given, "MODEL.WEIGHTS", weights, "--image", image])
    attention = json.loads(Path(path).read_text())["attention"]
    assert sorted(attention) == names
    assert all(a["entropy"] == pytest.approx(1, abs=1e-5) for a in attention.values())
    assert f"with {weights}" in capsys.readouterr().out


def test_features_of_random_weights_do_not_grow():
    """With FrozenBN's own statistics they would, by orders of magnitude."""
    torch.manual_seed(0)
    model = flops.build_for_analysis(CONFIG, SMALL)
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.register_forward_pre_hook(_take_statistics)
    with torch.no_grad():
        features = model.eval().backbone.bottom_up(torch.randn(1, 3, 64, 96))
    assert all(0.3 < x.std() < 10 for x in features.values())


def test_weights_that_a_configuration_trains_from(tmp_path):
    assert initial_weights(CONFIG, []) == initial_weights(LAZY, []) == ""  # detectron2's
    file = tmp_path / "w.pth"
    file.touch()
    assert initial_weights(CONFIG, ["MODEL.WEIGHTS", str(file)]) == str(file)
    assert initial_weights(LAZY, [f"train.init_checkpoint={file}"]) == str(file)
    with pytest.raises(FileNotFoundError, match="There is no file of weights 'no_such.pth'"):
        initial_weights(CONFIG, ["MODEL.WEIGHTS", "no_such.pth"])
    with pytest.raises(SystemExit):
        parse_args(["--config-file", CONFIG, "--image", "no_such.png"])


def test_a_lazy_configuration():
    lazy = flops.build_for_analysis(str(ROOT / "configs" / "lazy" / "mask_rcnn_R50_NL.py"), [])
    assert list(blocks_of(lazy)) == ["backbone.bottom_up.res4.nl4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config-file", "missing.yaml"], "'missing.yaml'"),
        (["--config-file", CONFIG, "MODEL.NONLOCAL.POSITIONS", "('p9',)"], "'p9'"),
    ],
)
def test_wrong_input_ends_with_one_sentence(arguments, said):
    with pytest.raises(SystemExit, match=said):
        main(arguments)


def test_a_size_of_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["--config-file", CONFIG, "--size", "0", "96"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_former_names_work_and_name_the_new_ones():
    with pytest.warns(FutureWarning, match="--json is now --output-json"):
        args = parse_args(["--config-file", CONFIG, "--json", "counts.json"])
    assert args.output_json == "counts.json"
    done = run_tool("analyze_model", "--help")
    assert "--output-json" in done.stdout
    assert "FutureWarning: tools/analyze_model.py is now tools/analyze_blocks.py" in done.stderr
