#!/usr/bin/env python
"""Count the parameters and FLOPs that blocks add: ``nonlocal-det analyze``."""

import sys

from nonlocal_det.cli.analyze import main

if __name__ == "__main__":
    sys.exit(main())
