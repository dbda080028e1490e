"""Attention of non-local blocks: record it in an inference call, then draw, explore, measure it."""

from ..utils.deprecation import renamed_attributes
from ..utils.plotting import save_figure
from .explorer import explorer_page
from .figure import (
    AttentionQuery,
    attention_figure,
    attention_panel,
    detection_figure,
    queries_from_instances,
)
from .geometry import Grid
from .influence import Change, Influence
from .instance_overlay import draw_mask, overlay_instances
from .overlay import (
    draw_arrows,
    draw_box,
    draw_point,
    overlay_attention,
    resize_longest_side,
)
from .recorder import AttentionRecorder
from .statistics import AttentionStats, attention_stats, dataset_stats
from .visualizer import AttentionVisualizer

__getattr__ = renamed_attributes(
    __name__,
    {
        "Look": "AttentionQuery",
        "arrows_over": "draw_arrows",
        "box_over": "draw_box",
        "fit": "resize_longest_side",
        "heat_over": "overlay_attention",
        "instances_over": "overlay_instances",
        "look_figure": "attention_figure",
        "looks_of": "queries_from_instances",
        "panel": "attention_panel",
        "point_over": "draw_point",
    },
)
