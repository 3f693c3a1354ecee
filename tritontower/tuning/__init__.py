"""Finding launch configurations: what they compile to on any machine, and what they cost on a given one."""
