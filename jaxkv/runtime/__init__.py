"""What concerns the process that JAX runs in: devices, compiled programs, seeds."""
