"""The places where a configuration's model takes blocks, and the check of its positions."""

from __future__ import annotations

from typing import Optional

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY

from .positions import Position, PositionError, parse_position

STAGES = ("res2", "res3", "res4", "res5")
FPN_LEVELS = ("p2", "p3", "p4", "p5", "p6", "p7")

# Builders whose bottom is a ResNet, with the number of levels that an FPN adds above its own.
RESNET_BUILDERS = {
    "build_nonlocal_resnet_backbone": None,
    "build_nonlocal_resnet_fpn_backbone": 1,
    "build_nonlocal_retinanet_resnet_fpn_backbone": 2,
}
# The builder that puts blocks after the outputs of another one, MODEL.NONLOCAL.BACKBONE.
WRAPPER_BUILDER = "build_nonlocal_backbone"
HEADS = {
    "box_head": ("ROI_BOX_HEAD", "NonLocalFastRCNNConvFCHead"),
    "mask_head": ("ROI_MASK_HEAD", "NonLocalMaskRCNNConvUpsampleHead"),
    "keypoint_head": ("ROI_KEYPOINT_HEAD", "NonLocalKRCNNConvDeconvUpsampleHead"),
}
# detectron2's meta-architectures without box, mask and keypoint heads.
HEADLESS = ("ProposalNetwork", "RetinaNet", "SemanticSegmentor")


def check_positions(cfg: CfgNode) -> list[Position]:
    """Read ``MODEL.NONLOCAL.POSITIONS`` and see that the model takes each.

    Raises:
        PositionError: with the position, why nothing takes it, and the places that do.
    """
    positions = [parse_position(text) for text in cfg.MODEL.NONLOCAL.POSITIONS]
    if cfg.MODEL.BACKBONE.NAME == WRAPPER_BUILDER:
        _check_wrapped(cfg.MODEL.NONLOCAL.BACKBONE)
    obstacles = {**_backbone_obstacles(cfg), **_head_obstacles(cfg)}
    free = [place for place, obstacle in obstacles.items() if not obstacle]
    for position in positions:
        obstacle = obstacles.get(position.target, "there is no such place")
        if obstacle:
            raise PositionError(
                f"Position {position.text!r} of MODEL.NONLOCAL.POSITIONS: {obstacle}. This model "
                f"takes blocks at {', '.join(free) or 'no place'}."
            )
    return positions


def output_positions(cfg: CfgNode) -> list[str]:
    """Where `WRAPPER_BUILDER` takes blocks: the outputs that the rest of the model reads.

    Of a meta-architecture that is not detectron2's own it cannot be told what it reads: then these
    are all the places that no head takes.
    """
    used = used_features(cfg)
    if used is not None:
        return sorted(used)
    named = {parse_position(text).target for text in cfg.MODEL.NONLOCAL.POSITIONS}
    return sorted(named - set(HEADS))


def _check_wrapped(name: str) -> None:
    """Raise a PositionError unless a backbone of that name can be wrapped."""
    registered = [builder for builder, _ in BACKBONE_REGISTRY]
    stock = [
        builder for builder in registered if builder not in (*RESNET_BUILDERS, WRAPPER_BUILDER)
    ]
    if name not in stock:
        what = "takes blocks by itself" if name in registered else "is no registered backbone"
        raise PositionError(
            f"MODEL.BACKBONE.NAME is {WRAPPER_BUILDER!r} and wraps MODEL.NONLOCAL.BACKBONE, which "
            f"is "
            f"{name!r} and {what}; it must be one of {', '.join(sorted(stock))}."
        )


def _backbone_obstacles(cfg: CfgNode) -> dict[str, str]:
    """For each place of the backbone: why a block there would not be part of the model, or ""."""
    if cfg.MODEL.BACKBONE.NAME != WRAPPER_BUILDER:
        return {**_stage_obstacles(cfg), **_level_obstacles(cfg)}
    in_head = {"res5": _stage_obstacles(cfg)["res5"]} if _builds_res5_in_head(cfg) else {}
    return {**dict.fromkeys(output_positions(cfg), ""), **in_head}


def _stage_obstacles(cfg: CfgNode) -> dict[str, str]:
    """Likewise for each residual stage."""
    last = max((name for name in _stages_read(cfg) if name in STAGES), default="none")
    obstacles = {}
    for stage in STAGES:
        if stage == "res5" and _builds_res5_in_head(cfg):
            wanted = "NonLocalRes5ROIHeads"
            obstacles[stage] = _other("ROI_HEADS", cfg.MODEL.ROI_HEADS.NAME, (wanted,))
        elif cfg.MODEL.BACKBONE.NAME not in RESNET_BUILDERS:
            obstacles[stage] = _other("BACKBONE", cfg.MODEL.BACKBONE.NAME, tuple(RESNET_BUILDERS))
        elif stage > last:
            obstacles[stage] = f"nothing uses {stage}: the last stage that is read is {last}"
        else:
            obstacles[stage] = ""
    return obstacles


def _stages_read(cfg: CfgNode) -> set[str]:
    """The outputs of the ResNet that an FPN, or without one the rest of the model, reads."""
    extra = RESNET_BUILDERS.get(cfg.MODEL.BACKBONE.NAME)
    if extra is None:
        used = used_features(cfg)
        return set(cfg.MODEL.RESNETS.OUT_FEATURES) if used is None else used
    # RetinaNet's additional levels come from res5.
    return {*cfg.MODEL.FPN.IN_FEATURES, *(["res5"] if extra == 2 else [])}


def _builds_res5_in_head(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and "Res5" in cfg.MODEL.ROI_HEADS.NAME


def _level_obstacles(cfg: CfgNode) -> dict[str, str]:
    """Likewise for each output of an FPN."""
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
    """The backbone's outputs that the rest of the model reads, or None if that cannot be told."""
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


def _head_obstacles(cfg: CfgNode) -> dict[str, str]:
    """Likewise for each head."""
    on = {"mask_head": "MASK_ON", "keypoint_head": "KEYPOINT_ON"}
    obstacles = {}
    for place, (node, wanted) in HEADS.items():
        if cfg.MODEL.META_ARCHITECTURE in HEADLESS:
            obstacles[place] = f"a {cfg.MODEL.META_ARCHITECTURE} has no {place}"
        elif place in on and not cfg.MODEL[on[place]]:
            obstacles[place] = f"MODEL.{on[place]} is False"
        elif place == "box_head" and _builds_res5_in_head(cfg):
            obstacles[place] = "res5 is the box head of this model"
        elif cfg.MODEL[node].NAME != wanted:
            obstacles[place] = _other(node, cfg.MODEL[node].NAME, (wanted,))
        else:
            obstacles[place] = ""
    return obstacles


def _other(node: str, name: str, wanted: tuple[str, ...]) -> str:
    if name in wanted:
        return ""
    return f"MODEL.{node}.NAME is {name!r}, which takes no blocks there; {' or '.join(wanted)} does"
