"""Kernels in machine code for CPUs, where XLA's own leave much of the machine unused."""
