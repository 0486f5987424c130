"""Differential privacy: what was spent, what may be, and training that keeps to it."""

from fedkit.privacy.models import check, fix

__all__ = ["check", "fix"]
