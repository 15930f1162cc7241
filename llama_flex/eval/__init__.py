"""Evaluation: checks of masks, scoring of given text, and the adapter for lm-eval."""
