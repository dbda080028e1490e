"""What blocks look at: recorded from an inference call, drawn, explored and measured."""

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
from .overlay import (
    draw_arrows,
    draw_box,
    draw_point,
    overlay_attention,
    overlay_instances,
    resize_longest_side,
)
from .recorder import AttentionRecorder
