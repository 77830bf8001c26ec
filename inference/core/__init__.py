"""What every other package may use: the model's facts, a forward's batch, numerics, errors, files."""
