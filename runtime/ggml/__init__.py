"""ggml through ctypes: the library, graphs, GGUF files, weights."""
