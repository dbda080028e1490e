"""Lamps, the bundled synthetic dataset for long-range dependencies."""

from .generator import Instance, Scene, render_image, render_scene
from .paint import LAMP_COLORS, Lamp
from .params import CATEGORIES, LampsParams
from .writer import ensure_dataset, image_rng, write_dataset
