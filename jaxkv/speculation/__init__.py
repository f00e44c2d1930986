"""Draft, decide, commit: several tokens in one pass through the network."""
