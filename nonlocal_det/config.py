"""The configuration keys, their defaults, and loading with clear errors."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from .utils.config_files import find_config_file
from .utils.deprecation import warn_renamed

# Former keys of MODEL.NONLOCAL, which still work for one release, and their new names.
RENAMED_KEYS = {"BACKBONE": "WRAPPED_BACKBONE", "ORDER": "TAYLOR_ORDER", "WINDOW": "WINDOW_SIZE"}


def add_nonlocal_config(cfg: CfgNode) -> None:
    """Add ``MODEL.NONLOCAL`` and the new ``SOLVER`` keys; with the defaults nothing changes.

    Args:
        cfg: detectron2's configuration, extended in place.
    """
    cfg.MODEL.NONLOCAL = node = CfgNode()
    # Positions of blocks: each names residual blocks, convolutions or an output, in Python's
    # indexing syntax, and a block goes after each: "res4[-2]", "res3[1::2]", "p3", "mask_head[-1]".
    # A position can override the settings below: "res3[:] MECHANISM=global_context REDUCTION=16".
    node.POSITIONS = ()
    # The registered backbone that build_nonlocal_backbone wraps; positions then name its outputs.
    node.WRAPPED_BACKBONE = ""
    # Attention mechanism: "non_local" (Wang et al.), "global_context" (GCNet), "disentangled"
    # (DNL), "compact_generalized" (CGNL) or "windowed" (multi-head attention inside windows).
    # It uses those of the settings below that it has.
    node.MECHANISM = "non_local"
    # Whose block it is, where SCALE, QK_NORM, NORM, INIT and POOL_FIRST are not given: ours, whose
    # softmax starts neither saturated nor flat, "recommended", the "paper"'s, or that of its
    # official code, "caffe2".
    node.PRESET = "recommended"
    # Pairwise function (mmcv's "mode"): "gaussian", "embedded_gaussian", "dot_product" or
    # "concatenation".
    node.PAIRWISE = "embedded_gaussian"
    # Ratio of channels to inner channels.
    node.REDUCTION = 2
    # Max-pool keys and values by 2 in space: a quarter of the pairwise computation.
    node.SUBSAMPLE = False
    # Max-pool before the key and value convolutions, as in the official Caffe2 code; False, like
    # None, pools after them, as in the paper.
    node.POOL_FIRST = None
    # Divide the softmax logits by sqrt(inner channels), as in the official Caffe2 code (True), or
    # not, as in the paper (False). None: neither, see QK_NORM.
    node.SCALE = None
    # Scale queries and keys to unit length: the softmax logits are their cosines, times a learned
    # factor. None: with a softmax, unless SCALE is given.
    node.QK_NORM = None
    # Initial value of that factor, from 1 to 100. None: 10.
    node.LOGIT_SCALE = None
    # Norm after the output convolution: "BN", "SyncBN", "naiveSyncBN", "GN", or "" for none. With
    # "" the output convolution itself starts at zero, which suits few images per GPU. "auto" is
    # each mechanism's own: none for global_context, of which a norm sees one vector per image, and
    # "BN" for the others.
    node.NORM = "auto"
    # Initialization of the embeddings: "kaiming", as in the paper, or "normal" (standard deviation
    # 0.01), as in the official Caffe2 code. None: "kaiming".
    node.INIT = None
    # compact_generalized: number of channel groups.
    node.GROUPS = 1
    # windowed: number of attention heads.
    node.NUM_HEADS = 1
    # windowed: side of the windows in positions of the feature map, or None for all of space.
    node.WINDOW_SIZE = None
    # compact_generalized: kernel function, "dot_product" or the Taylor-expanded "gaussian".
    node.KERNEL = "dot_product"
    # compact_generalized: order of the Gaussian kernel's Taylor expansion.
    node.TAYLOR_ORDER = 3
    # Mask padding in the blocks, so that an image's features do not depend on the batch it is in;
    # see nonlocal_det/modeling/padding_mask.py.
    node.MASK_PADDING = True
    # Iterations between TensorBoard writes of attention maps and of each block's attention
    # statistics and weights; 0 for never. Each runs inference on three images.
    node.VIS_PERIOD = 0
    # Former keys; a value goes to the new key, with a warning.
    node.update(dict.fromkeys(RENAMED_KEYS))

    # Optimizer: "SGD" (detectron2's only option) or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Gradient accumulation: number of micro-batches that IMS_PER_BATCH images are split into in
    # each optimizer step. It saves memory and changes nothing else in the schedule.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Dtype of SOLVER.AMP.ENABLED: "float16", on GPUs only, or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"


def default_settings() -> dict[str, Any]:
    """Return the defaults of ``MODEL.NONLOCAL``."""
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    return dict(cfg.MODEL.NONLOCAL)


def with_new_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace former keys of ``MODEL.NONLOCAL`` by the new ones, with a warning for each in use.

    Args:
        settings: Values by key, former keys included.
    """
    current = {key: value for key, value in settings.items() if key not in RENAMED_KEYS}
    for old, new in RENAMED_KEYS.items():
        if settings.get(old) is not None:
            warn_renamed(f"MODEL.NONLOCAL.{old}", f"MODEL.NONLOCAL.{new}")
            current[new] = settings[old]
    return current


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Load a YAML configuration over the defaults of detectron2 and `add_nonlocal_config`.

    Args:
        config_file: Path of the YAML file.
        opts: Alternating keys and values, merged last.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, a key does not exist (the message lists the nearest
            that do), or a value has the wrong type.
    """
    config_file = find_config_file(config_file)
    if config_file.endswith(".py"):
        raise ValueError(
            f"{config_file!r} is a LazyConfig, for `nonlocal-det lazy-train` "
            f"(tools/lazyconfig_train_net.py); a YAML file goes here."
        )
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    known = [key for key, _ in _flatten(cfg)]
    if len(opts) % 2:
        raise ValueError(f"After the flags come pairs of KEY VALUE, not {' '.join(opts)!r}.")
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(opts))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{config_file!r} cannot be read as YAML: {said}.") from error
    except AttributeError as error:
        raise ValueError(f"{config_file!r} or its base holds no keys with values.") from error
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(_explain(error, known)) from error
    return cfg


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a LazyConfig and apply overrides.

    Args:
        config_file: Path of the Python file.
        overrides: Overrides of the form ``KEY=VALUE``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file or an override cannot be read, or an override names a key that does
            not exist.
    """
    config_file = find_config_file(config_file)
    if not config_file.endswith(".py"):
        raise ValueError(
            f"{config_file!r} is no LazyConfig, whose name ends in .py; YAML is for "
            f"`nonlocal-det train` (tools/train_net.py)."
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
    """Add the new ``train`` keys; with the defaults nothing changes."""
    if "train" in cfg:
        # Like SEED, SOLVER.ACCUMULATION_STEPS and SOLVER.AMP.DTYPE.
        cfg.train.setdefault("seed", -1)
        cfg.train.setdefault("accumulation_steps", 1)
        cfg.train.amp.setdefault("dtype", "float16")


def _check_lazy_key(cfg: DictConfig, key: str) -> None:
    """Raise a ValueError for a new key that nothing would read.

    New keys are allowed only in nodes with ``_target_``, where they become arguments of the call.
    """
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if isinstance(node, DictConfig) and last not in node and "_target_" not in node:
        near = difflib.get_close_matches(last, list(node), n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"There is no configuration key {key}.{hint}")


def differing_settings(config_file: str, cfg: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Compare a config with the one that a run has written.

    Args:
        config_file: Path of the run's ``config.yaml``.
        cfg: Config to compare.

    Returns:
        The run's value and the config's, by key; keys that only one of them has are left out.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no YAML file of keys and values.
    """
    try:
        with open(config_file, encoding="utf-8") as file:
            written = dict(_flatten(yaml.safe_load(file) or {}))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{config_file!r} is not the config of a run.") from error
    settings = _settings(cfg)
    shared = settings.keys() & written.keys()
    return {k: (written[k], v) for k, v in settings.items() if k in shared and written[k] != v}


def settings_digest(cfg: CfgNode) -> str:
    """A digest of the settings that differ from the defaults, the same on all machines.

    The device and the output directory do not count.

    Args:
        cfg: Config of a run.
    """
    defaults = get_cfg()
    add_nonlocal_config(defaults)
    default_of = _settings(defaults)
    changed = [
        (key, value)
        for key, value in sorted(_settings(cfg).items())
        if key not in ("OUTPUT_DIR", "MODEL.DEVICE") and default_of.get(key) != value
    ]
    return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:12]


def _settings(cfg: CfgNode) -> dict[str, Any]:
    """All values by their keys in dotted notation, as YAML would give them back."""
    return dict(_flatten(yaml.safe_load(cfg.dump())))


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over all values below a node, by their keys in dotted notation."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _explain(error: Exception, known: list[str]) -> str:
    """Turn an error of yacs, about an unknown key or a value's type, into one sentence."""
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
