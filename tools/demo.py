#!/usr/bin/env python
"""Train a small detector on the lamps dataset and draw its attention: ``nonlocal-det demo``."""

import sys

from nonlocal_det.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
