"""Sampling parameters, and what applies to logits before the draw: grammars, n-grams, users' functions."""
