"""Prompts in, text out: what callers hand to the core, and what it hands back."""
