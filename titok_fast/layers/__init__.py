"""Drop-in quantizer layers with the upstream constructor, returns and state_dict keys."""

from titok_fast.layers.accelerate import AcceleratedReport, accelerate
from titok_fast.layers.vector_quantizer import VectorQuantizer

__all__ = ["AcceleratedReport", "VectorQuantizer", "accelerate"]
