"""The embedded datasets. Importing this registers them with detectron2, and writes nothing."""

from .builtin import register_lamps
from .coco import ensure_dataset, picture_rng, write_dataset
from .lamps import CATEGORIES, LAMP_COLORS, Instance, Lamp, LampsParams, draw_picture

__all__ = [
    "CATEGORIES",
    "LAMP_COLORS",
    "Instance",
    "Lamp",
    "LampsParams",
    "draw_picture",
    "ensure_dataset",
    "picture_rng",
    "register_lamps",
    "write_dataset",
]

register_lamps()
