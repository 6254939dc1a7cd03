"""Drop-in quantizer layers with the upstream constructor, returns and state_dict keys."""

from titok_fast.layers.accelerate import accelerate
from titok_fast.layers.index_propagation_quantize import (
    CodeStatistics,
    IBQOutput,
    IndexPropagationQuantize,
    ibq_quantize,
)
from titok_fast.layers.vector_quantizer import VectorQuantizer

__all__ = [
    "CodeStatistics",
    "IBQOutput",
    "IndexPropagationQuantize",
    "VectorQuantizer",
    "accelerate",
    "ibq_quantize",
]
