"""Kernels that process rows independently: norms, rotary embedding, activations, gathers and means."""
