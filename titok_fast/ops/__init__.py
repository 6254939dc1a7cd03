"""The ops: one module each, with its schema, checks, backends and public function."""

from titok_fast.ops.nearest_code import nearest_code

__all__ = ["nearest_code"]
