"""Weights and tokenizers of published language models."""
