"""Eager PyTorch truth for every op; imports torch alone."""

from titok_fast.reference.attention import attention
from titok_fast.reference.conv3x3 import conv3x3
from titok_fast.reference.decode_attention import decode_attention
from titok_fast.reference.decode_linear import decode_linear
from titok_fast.reference.index_propagation import index_propagation
from titok_fast.reference.maskgit_step import maskgit_step
from titok_fast.reference.nearest_code import nearest_code
from titok_fast.reference.sample_token import sample_token

__all__ = [
    "attention",
    "conv3x3",
    "decode_attention",
    "decode_linear",
    "index_propagation",
    "maskgit_step",
    "nearest_code",
    "sample_token",
]
