"""Search for launch configurations: what they compile to on any machine, and their measured times on a GPU."""
