"""Checks of what callers pass in: numbers, tensors, functions with captured tensors; and how those fail."""
