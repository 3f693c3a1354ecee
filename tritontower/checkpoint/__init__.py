"""Finds and reads checkpoints: hub, safetensors files, configuration, weight map and dequantization."""
