"""What every other package may use: the model's facts, a forward's batch, numerics, errors, files."""

PROGRAM_VERSION = "0.1.0"
