"""Differential privacy: what was spent, what may be, and training that keeps to it."""
