"""The ops: one module each, with its schema, checks, backends and public function."""

from titok_fast.ops.attention import attention
from titok_fast.ops.conv3x3 import conv3x3, pack_conv3x3
from titok_fast.ops.decode_attention import decode_attention
from titok_fast.ops.decode_linear import decode_linear
from titok_fast.ops.index_propagation import index_propagation
from titok_fast.ops.maskgit_step import maskgit_step
from titok_fast.ops.nearest_code import nearest_code
from titok_fast.ops.sample_token import sample_token

__all__ = [
    "attention",
    "conv3x3",
    "decode_attention",
    "decode_linear",
    "index_propagation",
    "maskgit_step",
    "nearest_code",
    "pack_conv3x3",
    "sample_token",
]
