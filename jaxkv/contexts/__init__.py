"""Documents read once and asked many times: their state, files, turns and scores."""
