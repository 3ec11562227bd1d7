"""The embedded model and the table of known checkpoints."""
