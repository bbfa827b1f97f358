"""Which layers run."""
