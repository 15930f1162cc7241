"""Evaluation: checks and pictures of masks, scores of given text, parity with transformers, the adapter for lm-eval."""
