"""Handoff of embeddings to other libraries; each module is imported only when it is used."""
