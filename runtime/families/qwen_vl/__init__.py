"""Qwen-VL (arXiv 2308.12966)."""
