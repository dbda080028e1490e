#!/usr/bin/env python
r"""Train and evaluate a LazyConfig, with detectron2's standard flags; overrides are KEY=VALUE.

python tools/lazyconfig_train_net.py --num-gpus 8 \
    --config-file configs/lazy/mask_rcnn_R50_NL.py train.output_dir=output/R50
"""

import sys

from nonlocal_det.cli.lazy_train import main

if __name__ == "__main__":
    sys.exit(main())
