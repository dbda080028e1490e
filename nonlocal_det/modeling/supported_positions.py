"""Which positions the model of a configuration supports, and the check of those it has."""

from __future__ import annotations

from typing import Optional

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY

from ..config import with_new_keys
from .positions import Position, PositionError, parse_position

STAGES = ("res2", "res3", "res4", "res5")
FPN_LEVELS = ("p2", "p3", "p4", "p5", "p6", "p7")

# Builders with a ResNet, and the number of levels that their FPN adds above those of the ResNet.
RESNET_BUILDERS = {
    "build_nonlocal_resnet_backbone": None,
    "build_nonlocal_resnet_fpn_backbone": 1,
    "build_nonlocal_retinanet_resnet_fpn_backbone": 2,
}
# The builder that adds blocks after the outputs of another one, MODEL.NONLOCAL.WRAPPED_BACKBONE.
WRAPPER_BUILDER = "build_nonlocal_backbone"
HEADS = {
    "box_head": ("ROI_BOX_HEAD", "NonLocalFastRCNNConvFCHead"),
    "mask_head": ("ROI_MASK_HEAD", "NonLocalMaskRCNNConvUpsampleHead"),
    "keypoint_head": ("ROI_KEYPOINT_HEAD", "NonLocalKRCNNConvDeconvUpsampleHead"),
}
# detectron2's meta-architectures without box, mask and keypoint heads.
HEADLESS = ("ProposalNetwork", "RetinaNet", "SemanticSegmentor")


def check_positions(cfg: CfgNode) -> list[Position]:
    """Parse ``MODEL.NONLOCAL.POSITIONS`` and check that the model supports each.

    Raises:
        PositionError: If a position is not supported; the message says why and lists those that
            are.
    """
    positions = [parse_position(text) for text in cfg.MODEL.NONLOCAL.POSITIONS]
    if cfg.MODEL.BACKBONE.NAME == WRAPPER_BUILDER:
        _check_wrapped(wrapped_backbone(cfg))
    reasons = {**_backbone_unsupported(cfg), **_heads_unsupported(cfg)}
    supported = [target for target, reason in reasons.items() if not reason]
    for position in positions:
        reason = reasons.get(position.target, "there is no such position")
        if reason:
            raise PositionError(
                f"Position {position.text!r} of MODEL.NONLOCAL.POSITIONS: {reason}. This model "
                f"takes blocks at {', '.join(supported) or 'no position'}."
            )
    return positions


def output_positions(cfg: CfgNode) -> list[str]:
    """Positions that `WRAPPER_BUILDER` supports: the outputs that the rest of the model uses.

    For a custom meta-architecture the used outputs are unknown; every requested position that is
    not in a head is then assumed to be a backbone output.
    """
    used = used_features(cfg)
    if used is not None:
        return sorted(used)
    named = {parse_position(text).target for text in cfg.MODEL.NONLOCAL.POSITIONS}
    return sorted(named - set(HEADS))


def wrapped_backbone(cfg: CfgNode) -> str:
    """Name of the backbone that `WRAPPER_BUILDER` wraps."""
    return with_new_keys(cfg.MODEL.NONLOCAL)["WRAPPED_BACKBONE"]


def _check_wrapped(name: str) -> None:
    """Raise a PositionError unless ``name`` is a registered backbone that can be wrapped."""
    registered = [builder for builder, _ in BACKBONE_REGISTRY]
    stock = [
        builder for builder in registered if builder not in (*RESNET_BUILDERS, WRAPPER_BUILDER)
    ]
    if name not in stock:
        reason = "takes blocks itself" if name in registered else "is not a registered backbone"
        raise PositionError(
            f"MODEL.BACKBONE.NAME is {WRAPPER_BUILDER!r}, but MODEL.NONLOCAL.WRAPPED_BACKBONE is "
            f"{name!r}, which {reason}; it must be one of {', '.join(sorted(stock))}."
        )


def _backbone_unsupported(cfg: CfgNode) -> dict[str, str]:
    """Map each position of the backbone to the reason why it is unsupported, "" if it is not."""
    if cfg.MODEL.BACKBONE.NAME != WRAPPER_BUILDER:
        return {**_stages_unsupported(cfg), **_levels_unsupported(cfg)}
    in_head = {"res5": _stages_unsupported(cfg)["res5"]} if _builds_res5_in_head(cfg) else {}
    return {**dict.fromkeys(output_positions(cfg), ""), **in_head}


def _stages_unsupported(cfg: CfgNode) -> dict[str, str]:
    """Map each residual stage to the reason why it is unsupported, or ""."""
    last = max((name for name in _used_stages(cfg) if name in STAGES), default="none")
    reasons = {}
    for stage in STAGES:
        if stage == "res5" and _builds_res5_in_head(cfg):
            wanted = "NonLocalRes5ROIHeads"
            reasons[stage] = _other("ROI_HEADS", cfg.MODEL.ROI_HEADS.NAME, (wanted,))
        elif cfg.MODEL.BACKBONE.NAME not in RESNET_BUILDERS:
            reasons[stage] = _other("BACKBONE", cfg.MODEL.BACKBONE.NAME, tuple(RESNET_BUILDERS))
        elif stage > last:
            reasons[stage] = f"nothing uses {stage}: the last stage in use is {last}"
        else:
            reasons[stage] = ""
    return reasons


def _used_stages(cfg: CfgNode) -> set[str]:
    """Outputs of the ResNet that the FPN, or without one the rest of the model, uses."""
    extra = RESNET_BUILDERS.get(cfg.MODEL.BACKBONE.NAME)
    if extra is None:
        used = used_features(cfg)
        return set(cfg.MODEL.RESNETS.OUT_FEATURES) if used is None else used
    # RetinaNet's additional levels come from res5.
    return {*cfg.MODEL.FPN.IN_FEATURES, *(["res5"] if extra == 2 else [])}


def _builds_res5_in_head(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and "Res5" in cfg.MODEL.ROI_HEADS.NAME


def _levels_unsupported(cfg: CfgNode) -> dict[str, str]:
    """Map each FPN level to the reason why it is unsupported, or ""."""
    extra = RESNET_BUILDERS.get(cfg.MODEL.BACKBONE.NAME)
    if extra is None:
        builders = tuple(name for name, levels in RESNET_BUILDERS.items() if levels)
        return dict.fromkeys(FPN_LEVELS, _other("BACKBONE", cfg.MODEL.BACKBONE.NAME, builders))
    stages = [int(name[-1]) for name in cfg.MODEL.FPN.IN_FEATURES]
    have = [f"p{level}" for level in (*stages, *range(max(stages) + 1, max(stages) + 1 + extra))]
    used = used_features(cfg)
    return {
        level: "" if level in have and (used is None or level in used) else f"nothing uses {level}"
        for level in FPN_LEVELS
    }


def used_features(cfg: CfgNode) -> Optional[set[str]]:
    """Outputs of the backbone that the rest of the model uses, or None if they are unknown."""
    model = cfg.MODEL
    rpn = set(model.RPN.IN_FEATURES)
    if model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        rpn = set()
    regions = rpn | set(model.ROI_HEADS.IN_FEATURES)
    return {
        "RetinaNet": set(model.RETINANET.IN_FEATURES),
        "SemanticSegmentor": set(model.SEM_SEG_HEAD.IN_FEATURES),
        "ProposalNetwork": rpn,
        "GeneralizedRCNN": regions,
        "PanopticFPN": regions | set(model.SEM_SEG_HEAD.IN_FEATURES),
    }.get(model.META_ARCHITECTURE)


def _heads_unsupported(cfg: CfgNode) -> dict[str, str]:
    """Map each head to the reason why it is unsupported, or ""."""
    on = {"mask_head": "MASK_ON", "keypoint_head": "KEYPOINT_ON"}
    reasons = {}
    for target, (node, wanted) in HEADS.items():
        if cfg.MODEL.META_ARCHITECTURE in HEADLESS:
            reasons[target] = f"a {cfg.MODEL.META_ARCHITECTURE} has no {target}"
        elif target in on and not cfg.MODEL[on[target]]:
            reasons[target] = f"MODEL.{on[target]} is False"
        elif target == "box_head" and _builds_res5_in_head(cfg):
            reasons[target] = "res5 is the box head of this model"
        elif cfg.MODEL[node].NAME != wanted:
            reasons[target] = _other(node, cfg.MODEL[node].NAME, (wanted,))
        else:
            reasons[target] = ""
    return reasons


def _other(node: str, name: str, wanted: tuple[str, ...]) -> str:
    """Reason why a component without blocks does not support a position, "" for one with blocks."""
    if name in wanted:
        return ""
    return f"MODEL.{node}.NAME is {name!r}, which takes no blocks there; {' or '.join(wanted)} does"
