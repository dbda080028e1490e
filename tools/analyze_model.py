#!/usr/bin/env python
"""Former name of tools/analyze_blocks.py."""

import sys

from nonlocal_det.cli.analyze import main
from nonlocal_det.utils.deprecation import warn_renamed

if __name__ == "__main__":
    warn_renamed("tools/analyze_model.py", "tools/analyze_blocks.py")
    sys.exit(main())
