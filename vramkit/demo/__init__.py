"""The main job on a machine that has nothing yet: a small checkpoint, one clip twice, the memory of both."""
