"""What the cache keeps: a file per paper; `base` says what a policy answers."""
