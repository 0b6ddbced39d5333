"""CogVideoX and CogVideoX1.5 text-to-video."""
