"""What several model files share: the registry, encoders, configuration fields and prompt layouts."""
