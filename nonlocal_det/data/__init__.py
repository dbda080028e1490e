"""The bundled synthetic dataset (lamps). Importing it registers, and writes nothing."""

from ..utils.deprecation import renamed_attributes
from .builtin import register_lamps
from .lamps.generator import Instance, Scene, render_image, render_scene
from .lamps.paint import LAMP_COLORS, Lamp
from .lamps.params import CATEGORIES, LampsParams
from .lamps.writer import ensure_dataset, image_rng, write_dataset

__all__ = [
    "CATEGORIES",
    "LAMP_COLORS",
    "Instance",
    "Lamp",
    "LampsParams",
    "Scene",
    "render_image",
    "render_scene",
    "ensure_dataset",
    "image_rng",
    "register_lamps",
    "write_dataset",
]

__getattr__ = renamed_attributes(
    __name__, {"draw_picture": "render_image", "picture_rng": "image_rng"}
)

register_lamps()
