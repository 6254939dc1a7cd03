"""Swap the quantizers of an upstream model for the fused layers, in place."""

from collections.abc import Callable

import torch
from torch import nn

from titok_fast.layers.index_propagation_quantize import IndexPropagationQuantize
from titok_fast.layers.vector_quantizer import VectorQuantizer
from titok_fast.ops.arguments import check_module


def accelerate(
    model: nn.Module, *, backend: str = "auto", log: Callable[[str], None] = print
) -> nn.Module:
    """Replace the quantizers inside an upstream model by the fused layers.

    Modules are recognised by class name and attributes, without importing their package:
    `VectorQuantizer` of 1d-tokenizer and `IndexPropagationQuantize` of SEED-Voken. Parameters and
    buffers stay the same tensors, so optimizers, state dicts and checkpoints go on working; hooks
    and the training mode move along. SEED-Voken's `VectorQuantizer` and `VectorQuantizer2` and the
    `VectorQuantizer` of 1d-tokenizer's MaskGIT-VQGAN return other things than the layers here and
    are left, as the log says; so is a module with an option that these lack.

    Args:
        model: changed in place; a quantizer itself is fine too.
        backend: of the fused ops.
        log: takes a line for each module that was replaced, or left although it has a quantizer's
            name, with the reason; one that there is none.

    Returns:
        The model; the new layer where `model` itself was a quantizer.

    Raises:
        TypeError: for something else than a module.
    """
    check_module("model", model)
    layers: dict[int, nn.Module] = {}
    found = False
    for path, module in list(model.named_modules(remove_duplicate=False)):
        build = _BUILDERS.get(type(module).__name__)
        if build is None or type(module).__module__.startswith("titok_fast."):
            continue
        found, where = True, path or "the model"
        if id(module) not in layers:
            layer = build(module, backend)
            if isinstance(layer, str):
                log(f"left {where}: {layer}")
                continue
            _take_over(layer, module)
            layers[id(module)] = layer
        layer = layers[id(module)]
        log(f"replaced {where}: {_name(module)} by {_name(layer)}")
        if not path:
            return layer
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    if not found:
        log("found no quantizer to replace")
    return model


def _vector_quantizer(module: nn.Module, backend: str) -> nn.Module | str:
    if all(hasattr(module, name) for name in ("n_e", "e_dim", "beta")):
        return f"{_name(module)} is as SEED-Voken's and LlamaGen's, with returns of another form"
    if all(hasattr(module, name) for name in ("num_embeddings", "embedding_dim")):
        return f"{_name(module)} is MaskGIT-VQGAN's, whose returns are in another order"
    needed = ("codebook_size", "token_size", "commitment_cost", "use_l2_norm", "embedding")
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        return f"{_name(module)} has no {', '.join(missing)}, so it is not 1d-tokenizer's"
    if unknown := _unknown(module, (*needed, "clustering_vq", "decay", "embed_prob")):
        return unknown
    values = {name: getattr(module, name) for name in needed[:-1]}
    clustering = bool(getattr(module, "clustering_vq", False))
    with torch.device("meta"):
        return VectorQuantizer(**values, clustering_vq=clustering, backend=backend)


def _vector_quantizer2(module: nn.Module, backend: str) -> nn.Module | str:
    return f"{_name(module)} has other losses and returns than the layers here"


def _index_propagation_quantize(module: nn.Module, backend: str) -> nn.Module | str:
    needed = (
        "n_e", "e_dim", "beta", "use_entropy_loss", "cosine_similarity", "entropy_temperature",
        "sample_minimization_weight", "batch_maximization_weight",
    )  # fmt: skip
    remap = ("remap", "re_embed")
    missing = [name for name in (*needed, *remap, "embedding") if not hasattr(module, name)]
    if missing:
        return f"{_name(module)} has no {', '.join(missing)}, so it is not SEED-Voken's"
    if unknown := _unknown(module, (*needed, *remap, "embedding", "unknown_index", "used")):
        return unknown
    with torch.device("meta"):
        layer = IndexPropagationQuantize(
            **{name: getattr(module, name) for name in needed}, backend=backend
        )
    for name in (*remap, "unknown_index"):
        if hasattr(module, name):
            setattr(layer, name, getattr(module, name))
    return layer


_BUILDERS: dict[str, Callable[[nn.Module, str], nn.Module | str]] = {
    "VectorQuantizer": _vector_quantizer,
    "VectorQuantizer2": _vector_quantizer2,
    "IndexPropagationQuantize": _index_propagation_quantize,
}


def _unknown(module: nn.Module, known: tuple[str, ...]) -> str | None:
    """Why to leave a module that has options or tensors beyond the `known`, which may matter."""
    names = [
        name for name, value in vars(module).items() if value is not None and value is not False
    ]
    names += [*module._parameters, *module._buffers, *module._modules]
    others = [name for name in names if name not in (*known, "training") and name[0] != "_"]
    if not others:
        return None
    return f"{_name(module)} has {', '.join(sorted(others))}, which the layers here do not know"


def _take_over(layer: nn.Module, module: nn.Module) -> None:
    """Give `layer` the submodules, tensors, hooks and mode of `module`."""
    layer._parameters, layer._buffers = module._parameters, module._buffers
    layer._modules = module._modules
    for name in vars(module):
        if "_hook" in name or name == "decay":
            setattr(layer, name, getattr(module, name))
    layer.training = module.training


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
