"""Checkpoints by family, one module each: hyperparameters, every row to write, metadata, tokens."""
