"""Code shared by the model files: registry, encoders, configuration fields, weight maps and prompt layouts."""
