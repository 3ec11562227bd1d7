"""How the nano model is made: generator, training, export and evaluation (extra `train`)."""
