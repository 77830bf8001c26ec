"""Weights on disk: their table, reading and writing, manifests, loading, conversion."""
