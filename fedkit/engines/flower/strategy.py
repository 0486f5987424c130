"""stub"""
from __future__ import annotations
__all__ = ["FlowerStrategy"]
class FlowerStrategy:
    """stub"""
