"""What the package does on a GPU: kernels, speed, exactness and one training, on one page."""
