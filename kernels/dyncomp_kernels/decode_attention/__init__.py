"""Attention of single new positions over some slots of a cache."""
