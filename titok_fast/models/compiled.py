"""`torch.compile` of a model's blocks."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch
from torch import nn

from titok_fast.models.blocks import (
    BertBlock,
    LlamaBlock,
    ResidualAttentionBlock,
    UViTBlock,
)
from titok_fast.models.ibq import ResidualBlock
from titok_fast.models.maskgit_vqgan import ResnetBlock
from titok_fast.models.packed import packable
from titok_fast.ops.arguments import check_module

Model = TypeVar("Model", bound=nn.Module)

_COMPILE_OPTIONS = inspect.signature(torch.compile).parameters  # torch 2.10 lacks some


def compile(model: Model) -> Model:
    """Applies `torch.compile` to each block of a model, in place.

    The blocks of one kind share their compiled code, so that this takes seconds, not minutes; what
    lies between them is not worth compiling. The first call for a new shape compiles. Of
    `ARTransformer` that is `logits` and a prefix; decoding steps are ops of their own.

    A block in evaluation mode with weights of `pack_weights` is left as it is: compiled code does
    not read the copies, with which a CPU is faster.

    Args:
        model: any model of this package, or a module that holds its blocks.

    Returns:
        The model; its state_dict is unchanged.

    Raises:
        TypeError: for something else than a module.
        ValueError: when the module has none of the blocks.
    """
    check_module("model", model)
    kinds = (BertBlock, LlamaBlock, ResidualAttentionBlock, ResidualBlock, ResnetBlock, UViTBlock)
    blocks = [module for module in model.modules() if isinstance(module, kinds)]
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no block of a model of titok_fast")
    # IBQ's blocks alone have more shapes than the 8 that torch compiles one code for.
    raised = {"recompile_limit": 64} if "recompile_limit" in _COMPILE_OPTIONS else {}
    for block in blocks:
        if block.training or not any(layer.is_packed() for layer in packable(block)):
            block.compile(**raised)
    return model
