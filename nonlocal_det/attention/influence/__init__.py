"""What becomes of detections without what a block attends to."""
