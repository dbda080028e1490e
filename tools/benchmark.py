#!/usr/bin/env python
"""Measure time and peak memory of the operators and blocks: ``nonlocal-det benchmark``."""

import sys

from nonlocal_det.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
