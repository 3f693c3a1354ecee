"""The layer graph of a tower: building it, rewriting it, and what follows from it without running it."""
