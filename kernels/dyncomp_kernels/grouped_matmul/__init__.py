"""Grouped matrix product: sorted rows, one weight matrix a group."""
