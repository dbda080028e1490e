"""The one place where defaults live."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from detectron2.config import CfgNode, get_cfg


def add_nonlocal_config(cfg: CfgNode) -> None:
    """Add ``MODEL.NONLOCAL`` and ``SOLVER.OPTIMIZER``. With these defaults nothing changes."""
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
    # Keep what pads a batch out of the blocks, so that an image's features do not depend on what it
    # is batched with; see nonlocal_det/modeling/padding.py.
    node.MASK_PADDING = True
    # Every so many iterations, write pictures of attention and each block's entropy, gain and
    # weights to TensorBoard; 0 is never. Costs an inference call on three pictures each time.
    node.VIS_PERIOD = 0

    # "SGD", detectron2's only one, or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"


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
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    known = list(_keys(cfg))
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(options))
    except (KeyError, AssertionError) as error:
        raise ValueError(_explain(error, known)) from error
    return cfg


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def _explain(error: Exception, known: list[str]) -> str:
    """One sentence for what yacs says of a key that does not exist, with the nearest that do."""
    said = str(error.args[0]) if error.args else str(error)
    key: Optional[str] = said.rsplit(": ", 1)[-1] if "Non-existent" in said else None
    if key is None:
        return f"The configuration cannot be read: {said}"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"There is no configuration key {key}.{hint}"
