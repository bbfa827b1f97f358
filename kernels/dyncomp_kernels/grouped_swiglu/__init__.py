"""Experts of the SwiGLU kind on sorted rows."""
