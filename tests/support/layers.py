"""Import order of the packages: a module imports only from rows above its own, or from its own package."""

LAYERS = (
    ("errors",),
    ("config", "kernels", "text_table"),
    ("checkpoint", "graph", "devices"),
    ("batch",),
    ("preprocessing", "embedding", "engine"),
    ("cache", "prompt"),
    ("models", "scheduler"),
    ("tower",),
    ("integrations", "parity", "demo"),
    ("benchmarks",),
    ("tuning",),
    ("cli",),
    ("__main__",),
)
LEVEL = {package: level for level, row in enumerate(LAYERS) for package in row}
"""Package or loose module → row; modules of one row do not import each other."""
