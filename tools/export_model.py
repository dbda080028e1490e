#!/usr/bin/env python
"""Export a detector to TorchScript or ONNX: ``nonlocal-det export``."""

import sys

from nonlocal_det.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
