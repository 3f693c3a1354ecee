"""The demonstration: a full-size random checkpoint, photographs and an image of the patch features."""
