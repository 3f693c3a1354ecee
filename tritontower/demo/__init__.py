"""The demonstration: a full-size random checkpoint, photographs and a picture of the patch features."""
