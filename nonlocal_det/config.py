"""The one place where defaults live."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from .utils.config_files import find_config_file


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
    # Keep what pads a batch out of the blocks, so that an image's features do not depend on what it
    # is batched with; see nonlocal_det/modeling/padding_mask.py.
    node.MASK_PADDING = True
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
    config_file = find_config_file(config_file)
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
        raise ValueError(f"{config_file!r} or its base holds no keys with values.") from error
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(_explain(error, known)) from error
    return cfg


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A LazyConfig, with ``KEY=VALUE`` over it.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read; for an override that cannot, or of a key that nothing has.
    """
    config_file = find_config_file(config_file)
    if not config_file.endswith(".py"):
        raise ValueError(
            f"{config_file!r} is no LazyConfig, whose name ends in .py; tools/train_net.py takes "
            f"YAML."
        )
    try:
        cfg = LazyConfig.load(config_file)
    except SyntaxError as error:
        said = error.__cause__ or error
        raise ValueError(f"{config_file!r} cannot be read as Python: {said}.") from error
    _add_lazy_keys(cfg)
    try:
        for key, given, _ in (text.partition("=") for text in overrides):
            if given:
                _check_lazy_key(cfg, key.lstrip("+~"))
        return LazyConfig.apply_overrides(cfg, list(overrides))
    except (HydraException, KeyError) as error:
        raise ValueError(
            f"The overrides {' '.join(overrides)!r} cannot be read; each is KEY=VALUE, as in "
            f"train.max_iter=1000. {str(error).splitlines()[0]}"
        ) from error


def _add_lazy_keys(cfg: DictConfig) -> None:
    """Add to ``train`` what it lacks. These defaults change nothing."""
    if "train" in cfg:
        # As SEED, SOLVER.ACCUMULATION_STEPS and SOLVER.AMP.DTYPE.
        cfg.train.setdefault("seed", -1)
        cfg.train.setdefault("accumulation_steps", 1)
        cfg.train.amp.setdefault("dtype", "float16")


def _check_lazy_key(cfg: DictConfig, key: str) -> None:
    """What will be called may be given another argument; elsewhere nothing would read a new key."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if isinstance(node, DictConfig) and last not in node and "_target_" not in node:
        near = difflib.get_close_matches(last, list(node), n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"There is no configuration key {key}.{hint}")


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
