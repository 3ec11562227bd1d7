"""Qwen2-VL (arXiv 2409.12191)."""
