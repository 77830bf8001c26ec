"""The network's operations: their specification in plain torch, in C for CPUs, in Triton for GPUs."""
