"""The one place where defaults live."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import yaml
from detectron2.config import CfgNode, get_cfg


def add_nonlocal_config(cfg: CfgNode) -> None:
    """Add ``MODEL.NONLOCAL``, and to ``SOLVER`` what it lacks. These defaults change nothing."""
    cfg.MODEL.NONLOCAL = node = CfgNode()
    # Where blocks go, in Python's indexing syntax; a block comes after each selected place:
    # "res4[-2]", "res3[1::2]", "p3", "mask_head[-1]". A position may carry settings of its own:
    # "res3[:] MECHANISM=global_context REDUCTION=16".
    node.POSITIONS = ()
    # Which registered backbone build_nonlocal_backbone wraps; positions then name its outputs.
    node.BACKBONE = ""
    # Which mechanism: one of nonlocal_det.layers.MECHANISMS.
    node.MECHANISM = "non_local"
    # Each mechanism takes those of the settings below that it has.
    # The pairwise function: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".
    node.PAIRWISE = "embedded_gaussian"
    # Channels / inner channels.
    node.REDUCTION = 2
    # Max-pool keys and values by 2 in space: a quarter of the pairwise work.
    node.SUBSAMPLE = False
    # Pool before the embeddings, as the paper's released code, not after them, as its text.
    node.POOL_FIRST = False
    # Divide the softmax logits by sqrt(inner channels), as the released code does.
    node.SCALE = False
    # After the output convolution: "BN", "SyncBN", "naiveSyncBN", "GN", or "" for none (then the
    # output convolution itself starts at zero, which suits few images per GPU).
    node.NORM = "BN"
    # Of the embeddings: "he", as the text says, or "gaussian" (std 0.01), as the released code.
    node.INIT = "he"
    # compact_generalized and grouped: number of channel groups.
    node.GROUPS = 1
    # grouped: side of the windows in positions, or None for all of space.
    node.WINDOW = None
    # compact_generalized: "dot_product", or "gaussian", Taylor-expanded to this order.
    node.KERNEL = "dot_product"
    node.ORDER = 3
    # Every so many iterations, write pictures of attention and each block's entropy, gain and
    # weights to TensorBoard; 0 is never. Costs an inference call on three pictures each time.
    node.VIS_PERIOD = 0

    # "SGD", detectron2's only one, or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Forward and backward passes in one step of the optimiser, which share IMS_PER_BATCH pictures
    # between them: the memory of a smaller batch, and nothing else in the schedule to change.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # What SOLVER.AMP.ENABLED computes in: "float16", on GPUs only, or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"


def default_settings() -> dict[str, Any]:
    """The defaults of ``MODEL.NONLOCAL``."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    return dict(cfg.MODEL.NONLOCAL)


def load_config(config_file: str, options: Sequence[str] = ()) -> CfgNode:
    """detectron2's defaults and ours, then a YAML file, then ``KEY VALUE`` pairs over it.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a key does not exist, with the nearest that do, or a value's type is another.
    """
    if not os.path.isfile(config_file):
        raise FileNotFoundError(f"There is no configuration file {config_file!r}.")
    if config_file.endswith(".py"):
        raise ValueError(
            f"{config_file!r} is a LazyConfig, which tools/lazyconfig_train_net.py takes; a YAML "
            f"file goes here."
        )
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    known = list(_keys(cfg))
    if len(options) % 2:
        raise ValueError(f"After the flags come pairs of KEY VALUE, not {' '.join(options)!r}.")
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(options))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{config_file!r} cannot be read as YAML: {said}.") from error
    except AttributeError as error:
        raise ValueError(f"{config_file!r} holds no keys with values, or its base.") from error
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(_explain(error, known)) from error
    return cfg


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def _explain(error: Exception, known: list[str]) -> str:
    """One sentence for what yacs says of a key that does not exist, or of a value's type."""
    said = str(error.args[0]) if error.args else str(error)
    mismatch = re.search(r"\(<class '(\w+)'>.*\((.*) vs\. (.*)\) for config key: (.*)", said)
    if mismatch:
        kind, default, value, key = mismatch.groups()
        return f"{key} is {value!r}; it must be a {kind}, such as {default}."
    key: Optional[str] = said.rsplit(": ", 1)[-1] if "Non-existent" in said else None
    if key is None:
        return f"The configuration cannot be read: {said}"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"There is no configuration key {key}.{hint}"
