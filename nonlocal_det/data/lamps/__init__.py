"""Lamps, the bundled synthetic dataset for long-range dependencies."""

from .generator import CATEGORIES, LAMP_COLORS, Instance, Lamp, LampsParams, render_image
from .writer import ensure_dataset, image_rng, write_dataset
