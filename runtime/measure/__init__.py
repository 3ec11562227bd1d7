"""Measurements of a model's files: calibration, comparison with a reference, memory, speed."""
