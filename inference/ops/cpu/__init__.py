"""The operations in C for CPUs."""
