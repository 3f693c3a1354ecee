"""Compiles kernels ahead of time, without the device, and reads the machine code."""
