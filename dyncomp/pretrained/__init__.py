"""Weights and tokenizers of published language models."""

from dyncomp.pretrained.export import export
from dyncomp.pretrained.load import Loaded, load
from dyncomp.pretrained.source import smollm2
from dyncomp.pretrained.tokenizer import Tokenizer, check_pair

__all__ = ["Loaded", "Tokenizer", "check_pair", "export", "load", "smollm2"]
