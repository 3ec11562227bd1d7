"""Run Qwen2-VL: see a picture, read a prompt, reply."""
