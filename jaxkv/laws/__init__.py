"""What every policy must satisfy, as functions; `jaxkv.testing` is the door to them."""
