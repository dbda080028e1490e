"""Cost of the operators, of blocks and of whole detectors: time, peak memory, parameters, FLOPs."""
