#!/usr/bin/env python
"""Train a small network to see which settings of a block learn: ``nonlocal-det ablate-small``."""

import sys

from nonlocal_det.cli.ablate_small import main

if __name__ == "__main__":
    sys.exit(main())
