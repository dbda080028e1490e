#!/usr/bin/env python
"""Train two small detectors, without and with a block, and compare: ``nonlocal-det demo``."""

import sys

from nonlocal_det.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
