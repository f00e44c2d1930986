"""Checkpoints in the Hugging Face layout: configuration, weights, tokenizer."""
