"""The embedded dataset. Importing this package registers it with detectron2, and writes nothing."""

from .builtin import register_lamps
from .coco import ensure_dataset, picture_rng, write_dataset
from .lamps import CATEGORIES, Instance, Lamp, LampsParams, draw_picture

__all__ = [
    "CATEGORIES",
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
