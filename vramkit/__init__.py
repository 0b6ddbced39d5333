"""vramkit: run PyTorch models that are larger than the memory of the device that computes them."""

__version__ = "0.1.0"
