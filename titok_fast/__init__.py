"""Custom kernels and fast models for image tokenizers."""

__version__ = "0.1.0"

from titok_fast.layers import VectorQuantizer, accelerate
from titok_fast.models import MaskGITVQGAN, TiTok
from titok_fast.ops import nearest_code

__all__ = ["MaskGITVQGAN", "TiTok", "VectorQuantizer", "__version__", "accelerate", "nearest_code"]
