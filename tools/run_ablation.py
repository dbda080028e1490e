#!/usr/bin/env python
"""Train variants with several seeds and test their differences: ``nonlocal-det ablate``."""

import sys

from nonlocal_det.cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
