"""Records the attention of blocks in an inference call, in the coordinates of the images."""
