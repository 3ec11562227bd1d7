"""The one place that calls llama.h."""
