"""Variable-length flash attention and the attention pooling head."""
