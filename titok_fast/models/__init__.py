"""Models with the official parameter names: from images to tokens and back."""

from titok_fast.models.auto import Tokenizer, load_tokenizer
from titok_fast.models.autoregressive import ARSampling, ARTransformer
from titok_fast.models.compiled import compile
from titok_fast.models.generate import generate
from titok_fast.models.ibq import IBQTokenizer
from titok_fast.models.maskgit import MaskGIT, Sampling
from titok_fast.models.maskgit_vqgan import MaskGITVQGAN
from titok_fast.models.packed import pack_weights
from titok_fast.models.pretrained import PretrainedModel, Release
from titok_fast.models.titok import DiagonalGaussian, TiTok

__all__ = [
    "ARSampling",
    "ARTransformer",
    "DiagonalGaussian",
    "IBQTokenizer",
    "MaskGIT",
    "MaskGITVQGAN",
    "PretrainedModel",
    "Release",
    "Sampling",
    "TiTok",
    "Tokenizer",
    "compile",
    "generate",
    "load_tokenizer",
    "pack_weights",
]
