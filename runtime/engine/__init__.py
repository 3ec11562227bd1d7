"""The engine: slots of a KV cache, batches, sampling; knows tokens and vision spans, not messages."""
