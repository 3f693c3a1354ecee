"""Backend selection, launch configurations, segments, argument checks and device functions of all kernels."""
