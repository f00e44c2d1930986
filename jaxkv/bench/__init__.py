"""What a step costs: time, memory and bandwidth. The commands are in `jaxkv.cli`."""
