"""Custom kernels and fast models for image tokenizers."""

__version__ = "0.1.0"

from titok_fast.layers import IndexPropagationQuantize, VectorQuantizer, accelerate, ibq_quantize
from titok_fast.models import (
    ARTransformer,
    IBQTokenizer,
    MaskGIT,
    MaskGITVQGAN,
    TiTok,
    compile,
    generate,
    load_tokenizer,
    pack_weights,
)
from titok_fast.ops import (
    attention,
    conv3x3,
    decode_attention,
    decode_linear,
    index_propagation,
    maskgit_step,
    nearest_code,
    pack_conv3x3,
    sample_token,
)

__all__ = [
    "ARTransformer",
    "IBQTokenizer",
    "IndexPropagationQuantize",
    "MaskGIT",
    "MaskGITVQGAN",
    "TiTok",
    "VectorQuantizer",
    "__version__",
    "accelerate",
    "attention",
    "compile",
    "conv3x3",
    "decode_attention",
    "decode_linear",
    "generate",
    "ibq_quantize",
    "index_propagation",
    "load_tokenizer",
    "maskgit_step",
    "nearest_code",
    "pack_conv3x3",
    "pack_weights",
    "sample_token",
]
