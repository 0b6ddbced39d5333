"""What a call of a pipeline is made of: arguments, prompts, the denoising loop, the clip as pictures or a file."""
