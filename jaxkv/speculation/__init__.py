"""Draft, verify and commit several tokens in one pass."""
