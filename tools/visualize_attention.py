#!/usr/bin/env python
"""Draw the attention maps of a model's non-local blocks for images, folders, patterns and videos.

    python tools/visualize_attention.py --input photo.jpg "holiday/*.jpg" --output attention
    python tools/visualize_attention.py --config-file configs/mask_rcnn_R50_NL.yaml \
        --weights model_final.pth --input photo.jpg --point 320,200 --html --output attention

Without a config file it uses the model that ``tools/demo.py`` trained.
"""

import sys

from nonlocal_det.cli.visualize import main

if __name__ == "__main__":
    sys.exit(main())
