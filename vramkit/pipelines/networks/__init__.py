"""What the models share: layers, attention over token streams, video transformers, video autoencoders with tiles."""
