"""From an image or a video to embeddings."""
