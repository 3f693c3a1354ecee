"""Ahead-of-time (AOT) compilation of kernels in child processes, and reading of the machine code."""
