"""The embedded datasets. Importing this registers them with detectron2, and writes nothing."""

from .builtin import register_lamps
from .lamps.generator import CATEGORIES, LAMP_COLORS, Instance, Lamp, LampsParams, render_image
from .lamps.writer import ensure_dataset, image_rng, write_dataset

__all__ = [
    "CATEGORIES",
    "LAMP_COLORS",
    "Instance",
    "Lamp",
    "LampsParams",
    "render_image",
    "ensure_dataset",
    "image_rng",
    "register_lamps",
    "write_dataset",
]

register_lamps()
