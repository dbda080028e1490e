"""The demo: two detectors, trained side by side without and with a block, and a page on both."""
