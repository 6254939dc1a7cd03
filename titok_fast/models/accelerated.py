"""Ways to run a model faster: `torch.compile` of its blocks, and packed weights."""

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
        ValueError: when the module has none of the blocks.
    """
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


def pack_weights(model: Model) -> Model:
    """Lets a model on the CPU keep copies of its weights in the order of the fastest product.

    Inference without gradients then takes less time: linear layers multiply by weights in oneDNN's
    order, most for small batches, and 3x3 convolutions run as `conv3x3` does. It takes twice the
    memory for weights, of convolutions 2.8 times (4.6 where the CPU multiplies float32 in place of
    their 16 bits, and twice that of linear layers then). A weight that changes afterwards is used
    in its own order until it is packed again; a change through `weight.data`, or of single entries
    of a weight that was made under `torch.inference_mode`, is not seen, and must be followed by
    another call. A linear layer is not packed where PyTorch has no oneDNN. One that
    is replaced, by an adapter say, or has a forward hook is called as it is; a weight with a
    gradient, which an optimizer is about to change, is not packed.
    Compiled code does not read the copies.
    `ARTransformer.generate` has no use for it: it reads weights as they are for up to 16 rows, and
    packs them by itself for more.

    Args:
        model: any model of this package, or a module that holds its blocks, on the CPU.

    Returns:
        The model; its state_dict is unchanged, and a copy or a file of it is not packed.

    Raises:
        RuntimeError: the model is not on the CPU.
        ValueError: when the module has no layer to pack.
    """
    layers = packable(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layer of titok_fast")
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            raise RuntimeError(f"pack_weights: the model is on {parameter.device}, allowed is cpu")
    for layer in layers:
        layer.pack()
    return model
