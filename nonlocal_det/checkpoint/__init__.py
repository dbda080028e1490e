"""Checkpoints: load reports, atomic writing, and converters of other code's weights."""
