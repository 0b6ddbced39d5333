"""Reference pipelines: models written lean, checkpoints loaded mapped, one folder per model family."""
