"""Array operations with one float32 reference and several implementations each."""
