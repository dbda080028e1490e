#!/usr/bin/env python
"""Measure whether the attention of each block depends on the query, over a dataset.

    python tools/measure_attention.py --output measured
    python tools/measure_attention.py --config-file configs/mask_rcnn_R50_NL.yaml \
        --weights model_final.pth --dataset coco_2017_val --num-images 500 --output measured

Writes attention.csv and attention.png; ``nonlocal_det/attention/recording/statistics.py`` defines
the statistics. Without a config file it uses the model that ``tools/demo.py`` trained.
"""

import sys

from nonlocal_det.cli.measure_attention import main

if __name__ == "__main__":
    sys.exit(main())
