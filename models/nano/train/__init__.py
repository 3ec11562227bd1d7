"""Training of the nano model: generator, training, export and evaluation (extra `train`)."""
