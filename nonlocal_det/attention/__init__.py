"""What blocks look at: recorded from an inference call, drawn, explored and measured."""

from .draw import arrows_over, box_over, fit, heat_over, instances_over, point_over
from .explorer import explorer_page
from .figure import Look, detection_figure, look_figure, looks_of, panel, save_figure
from .geometry import Grid
from .recorder import AttentionRecorder
