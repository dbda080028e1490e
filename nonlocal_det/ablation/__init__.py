"""Variants of a detector against each other: suites, their runs, and what can be said of them."""
