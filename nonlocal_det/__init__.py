"""Non-local blocks anywhere in a detectron2 model, by configuration.

Importing this registers builders, heads and datasets in detectron2's registries, and does nothing
else.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "nonlocal_det needs detectron2, which no package index has under its own name. Install it "
        "into this environment with `python tools/install_detectron2.py` from a checkout of "
        "nonlocal_det, or with `pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2.git`."
    ) from error

from . import data  # noqa: F401
from .config import add_nonlocal_config
from .layers import NonLocalBlock
from .modeling import PositionError, insert_non_local

__version__ = "0.2.0.dev0"
__all__ = ["NonLocalBlock", "PositionError", "add_nonlocal_config", "insert_non_local"]
