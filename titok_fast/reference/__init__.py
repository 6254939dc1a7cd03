"""Eager PyTorch truth for every op; imports torch alone."""

from titok_fast.reference.nearest_code import nearest_code

__all__ = ["nearest_code"]
