#!/usr/bin/env python
"""Former name of tools/run_ablation.py."""

import sys

from nonlocal_det.cli.ablate import main
from nonlocal_det.utils.deprecation import warn_renamed

if __name__ == "__main__":
    warn_renamed("tools/compare.py", "tools/run_ablation.py")
    sys.exit(main())
