"""Turns the images of a call into batches, runs them, and returns one embedding for each image, in order."""
