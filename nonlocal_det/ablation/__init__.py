"""Ablation studies: suites of variants, their runs, and statistics of the differences."""
