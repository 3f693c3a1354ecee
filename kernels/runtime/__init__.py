"""What all kernels share: backend choice, launch configurations, segments and device functions."""
