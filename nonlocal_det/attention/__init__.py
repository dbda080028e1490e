"""Attention of non-local blocks: record it in an inference call, then draw, explore, measure it."""

from ..utils.deprecation import renamed_attributes
from ..utils.plotting import save_figure
from .figures.attention_figure import (
    attention_figure,
    attention_panel,
    detection_figure,
)
from .figures.explorer import explorer_page
from .figures.instance_overlay import draw_mask, overlay_instances
from .figures.overlay import (
    draw_arrows,
    draw_box,
    draw_point,
    overlay_attention,
    resize_longest_side,
)
from .figures.visualizer import AttentionVisualizer
from .influence.faithfulness import Faithfulness, measure_faithfulness
from .influence.influence import Change, Influence
from .recording.geometry import Grid
from .recording.query import AttentionQuery, queries_from_instances
from .recording.recorder import AttentionRecorder
from .recording.statistics import AttentionStats, attention_stats, dataset_stats

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
