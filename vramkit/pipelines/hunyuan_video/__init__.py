"""HunyuanVideo text-to-video."""
