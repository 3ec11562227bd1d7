"""The embedded nano model: checkpoint, tokenizer, card; its training lives in `train`."""
