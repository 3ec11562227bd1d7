"""Qwen3-VL (arXiv 2511.21631)."""
