"""Rows times one matrix."""
