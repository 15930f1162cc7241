"""Kernels: hand-written ones, and the choice of which kernel runs when."""
