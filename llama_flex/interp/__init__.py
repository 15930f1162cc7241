"""Interpretability: hook points, captures, edits, and the probes that apply them in each layer."""
