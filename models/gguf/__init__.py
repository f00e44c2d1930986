"""Checkpoints in one GGUF file: configuration, weights, tokenizer."""
