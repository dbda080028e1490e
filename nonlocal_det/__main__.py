"""``python -m nonlocal_det COMMAND``: the command ``nonlocal-det`` without its script."""

import sys

from nonlocal_det.cli import main

if __name__ == "__main__":
    sys.exit(main())
