"""The command `jaxkv`. Nothing imports this package."""
