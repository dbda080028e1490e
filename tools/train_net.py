#!/usr/bin/env python
"""Train and evaluate a YAML config, with detectron2's standard flags.

python tools/train_net.py --config-file configs/mask_rcnn_R50_NL.yaml --num-gpus 8
torchrun --nproc_per_node 8 tools/train_net.py --config-file configs/mask_rcnn_R50_NL.yaml

--train-json and --val-json give custom datasets; --check-data reports all of their issues.
"""

import sys

from nonlocal_det.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
