"""Flax networks and the loader of Hugging Face checkpoints."""
