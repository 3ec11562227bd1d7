"""What a model's files cost and are worth: calibration, comparison with a reference, memory."""
