"""Conformance cases: outputs of the official implementations on weights made from a seed."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "conformance"
SEED = 7
# Inside an embedding module by name, but drawn like any other matrix.
PROJECTIONS = ("decoder_embed.weight", "patch_embed.weight")


def manifest(case: str) -> dict[str, Any]:
    """The `config` and `parameters` (name to shape) of a case."""
    return json.loads((FOLDER / f"{case}.manifest.json").read_text())


def expected(case: str) -> dict[str, Tensor]:
    """The official outputs of a case."""
    with np.load(FOLDER / f"{case}.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def uniform(name: str, shape: list[int] | tuple[int, ...], seed: int = SEED) -> np.ndarray:
    """Uniform in [0, 1) on a grid of 2^-24, float32, a function of seed, name and shape alone."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    draws = bits.random_raw(int(np.prod(shape, dtype=np.int64))) >> np.uint64(40)
    return (draws.astype(np.float32) * np.float32(2**-24)).reshape(shape)


def parameter(name: str, shape: list[int]) -> Tensor:
    """A weight: +-sqrt(3 / fan_in) for a matrix, +-1 for an embedding, +-0.1 for a vector."""
    value = uniform(name, shape) * np.float32(2) - np.float32(1)
    if len(shape) == 1:
        value = np.float32(name.endswith("weight")) + np.float32(0.1) * value
    elif name.endswith(PROJECTIONS) or not any(s in name for s in ("token", "emb", "ada_gss")):
        value *= np.float32((3.0 / int(np.prod(shape[1:]))) ** 0.5)
    return torch.from_numpy(value)


def weights(parameters: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state_dict for {name: shape}."""
    return {name: parameter(name, shape) for name, shape in parameters.items()}


def image(size: int, phase: float = 0.0) -> Tensor:
    """A smooth test image, [3, size, size] float32 in [0, 1]."""
    y, x = np.mgrid[:size, :size] / size
    waves = (
        np.sin(2 * np.pi * (3 * x + 2 * y) + phase),
        np.sin(2 * np.pi * (5 * x * y) + 1.0 + phase),
        np.cos(2 * np.pi * (x - 4 * y * y) + 2.0 + phase),
    )
    return torch.from_numpy(np.stack([0.5 + 0.5 * wave for wave in waves]).astype(np.float32))
