"""The one `torch.library.Library` of the package and the helper that registers an op with it."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("titok_fast", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `titok_fast::<schema>` and return the callable op.

    Args:
        schema: name, arguments and returns in PyTorch's schema language.
        cpu: implementation for CPU tensors.
        cuda: implementation for CUDA tensors.
        fake: output shapes and dtypes for tracing.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"titok_fast::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.titok_fast, name).default
    return op
