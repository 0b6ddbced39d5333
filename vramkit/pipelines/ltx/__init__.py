"""LTX-Video text-to-video."""
