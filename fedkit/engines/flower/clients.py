"""stub"""
from __future__ import annotations
__all__ = ["client_task"]
def client_task() -> None:
    """stub"""
