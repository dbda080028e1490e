"""Checkpoints: load reports, atomic writing, and conversion of other projects' weights."""
