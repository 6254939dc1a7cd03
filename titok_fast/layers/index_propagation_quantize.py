"""The quantizer of IBQ: a function over [..., D] and the drop-in layer."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from titok_fast.ops import inspect
from titok_fast.ops.arguments import check_sizes, check_weights, python_number, strided
from titok_fast.ops.index_propagation import (
    BACKENDS,
    Propagation,
    check_process_group,
    check_temperature,
    propagate,
)

QuantizerLoss = Tensor | tuple[Tensor, Tensor, Tensor, Tensor]


class IBQOutput(NamedTuple):
    """What `ibq_quantize` returns.

    Attributes:
        quantized: [..., D], whose gradient passes through the softmax over all codes.
        indices: [...] int64.
        quant_loss: [] float32, both commitment losses and beta times the codebook loss.
        sample_entropy: [] float32, the mean entropy of the sharp softmax.
        batch_entropy: [] float32, the entropy of its mean over all rows.
        entropy_loss: [] float32, sample_weight * sample_entropy - batch_weight * batch_entropy.
    """

    quantized: Tensor
    indices: Tensor
    quant_loss: Tensor
    sample_entropy: Tensor
    batch_entropy: Tensor
    entropy_loss: Tensor


class CodeStatistics(NamedTuple):
    """How a batch used the codebook; scalars on the device of the batch, without gradient.

    Attributes:
        usage: share of the codes that were chosen at least once.
        perplexity: exp of the entropy of how often each code was chosen.
        max_probability: mean over rows of the largest softmax probability.
    """

    usage: Tensor
    perplexity: Tensor
    max_probability: Tensor


def ibq_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    entropy_temperature: float = 0.01,
    sample_weight: float = 1.0,
    batch_weight: float = 1.0,
    entropy: bool = True,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> IBQOutput:
    """Quantize by index back-propagation, with the losses of IBQ.

    With e = E[argmax z E^T] and zq, which has the value of e and the gradient of the softmax over
    all codes:

        quant_loss = mean((zq - z)^2) + mean((sg(e) - z)^2) + beta mean((e - sg(z))^2)
        entropy_loss = sample_weight * sample_entropy - batch_weight * batch_entropy

    Args:
        z: [..., D], float32, float16 or bfloat16 ("reference": also float64).
        codebook: E, [K, D], same dtype and device; under autocast both are cast to its dtype.
        beta: weight of the codebook loss.
        entropy_temperature: of the softmax whose entropies are taken.
        sample_weight: of the entropy of each row, which is made small.
        batch_weight: of the entropy of the batch, which is made large.
        entropy: False saves the time of the entropies, which are then 0.
        process_group: see `index_propagation`, as for `backend`.
        backend: "auto", "cpu", "triton", "streaming" or "reference".

    Returns:
        An `IBQOutput`; losses are float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError, RuntimeError: as `index_propagation`.

    Source: arXiv 2412.02692, sections 3.2 and 3.3.
    """
    check_weights(beta=beta, sample_weight=sample_weight, batch_weight=batch_weight)
    entropy_temperature = python_number(entropy_temperature)
    check_temperature("entropy_temperature", entropy_temperature)
    output, _ = _quantize(
        z, codebook, beta, entropy_temperature, sample_weight, batch_weight, entropy,
        process_group, backend, probability=False,
    )  # fmt: skip
    return output


def _quantize(
    z: Tensor,
    codebook: Tensor,
    beta: float,
    temperature: float,
    sample_weight: float,
    batch_weight: float,
    entropy: bool,
    process_group: dist.ProcessGroup | None,
    backend: str,
    probability: bool,
) -> tuple[IBQOutput, Propagation]:
    if strided("z", z).ndim == 0:
        raise ValueError("z: expected [..., D], got shape []")
    rows = z.reshape(-1, z.shape[-1]) if z.ndim != 2 else z
    result = propagate(
        rows, codebook, temperature=temperature, entropy=entropy, process_group=process_group,
        probability=probability, backend=backend,
    )  # fmt: skip
    loss_dtype = result.sample_entropy.dtype
    quantized, codes, rows = (x.to(loss_dtype) for x in (result.quantized, result.codes, rows))
    count = max(1, rows.numel())  # losses of an empty batch are 0
    quant_loss = (
        (quantized - rows).square().sum()
        + (codes.detach() - rows).square().sum()
        + beta * (codes - rows.detach()).square().sum()
    ) / count
    output = IBQOutput(
        result.quantized.view(z.shape),
        result.indices.view(z.shape[:-1]),
        quant_loss,
        result.sample_entropy,
        result.batch_entropy,
        sample_weight * result.sample_entropy - batch_weight * result.batch_entropy,
    )
    return output, result


class _SharedGroup:
    """A process group: a copy of a layer shares it, a file leaves it out."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedGroup":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _SharedGroup, (None,)


class IndexPropagationQuantize(nn.Module):
    """Index back-propagation quantization on the fused `index_propagation`.

    A drop-in for SEED-Voken's `IndexPropagationQuantize`: same constructor, returns in training and
    evaluation, and state_dict (`embedding.weight`, and `used` with `remap`). The N x K logits are
    never held.

    Args:
        n_e: number of codes K.
        e_dim: dimension D of a code.
        beta: weight of the codebook loss.
        use_entropy_loss: compute the entropies and return the four losses.
        remap: file of NumPy indices: quantize with these codes alone, and return positions in that
            list.
        unknown_index: for `remap_to_used`, where an index is not in the list: "random", "extra"
            (one past its end) or an integer.
        cosine_similarity: kept, without effect, as upstream.
        entropy_temperature: of the softmax whose entropies are taken.
        sample_minimization_weight: of the mean entropy of the rows.
        batch_maximization_weight: of the entropy of their mean.
        process_group: take that mean over these ranks, too. A copy of the layer shares it; a pickle
            leaves it out.
        backend: of `index_propagation`.

    Source: arXiv 2412.02692.
    """

    used: Tensor

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        use_entropy_loss: bool = False,
        remap: str | None = None,
        unknown_index: str | int = "random",
        cosine_similarity: bool = False,
        entropy_temperature: float = 0.01,
        sample_minimization_weight: float = 1.0,
        batch_maximization_weight: float = 1.0,
        *,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(n_e=n_e, e_dim=e_dim)
        check_weights(
            beta=beta,
            sample_minimization_weight=sample_minimization_weight,
            batch_maximization_weight=batch_maximization_weight,
        )
        entropy_temperature = python_number(entropy_temperature)
        check_temperature("entropy_temperature", entropy_temperature)
        inspect.check_backend(backend, BACKENDS)
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.use_entropy_loss = use_entropy_loss
        self.cosine_similarity = cosine_similarity
        self.entropy_temperature = entropy_temperature
        self.sample_minimization_weight = sample_minimization_weight
        self.batch_maximization_weight = batch_maximization_weight
        self.process_group = process_group
        self.backend = backend
        self.embedding = nn.Embedding(n_e, e_dim)
        self.remap = remap
        self.re_embed = n_e
        if remap is not None:
            self.register_buffer("used", torch.tensor(np.load(remap)))
            self.re_embed = len(self.used)
            self.unknown_index = unknown_index
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks over whose rows the entropy of the mean is taken, beside this one."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        check_process_group(group)
        self._group = _SharedGroup(group)

    def forward(
        self, z: Tensor, temp: Any = None, return_logits: bool = False
    ) -> tuple[Tensor, QuantizerLoss, tuple[None, None, Tensor]]:
        """Quantize a batch.

        Args:
            z: latents [B, D, H, W] in the dtype of the codebook, in any under autocast; float64 is
                quantized in float32.
            temp: without effect, as upstream.
            return_logits: without effect, as upstream.

        Returns:
            Quantized latents [B, D, H, W]; the quantization loss, with `use_entropy_loss` the four
            of quantization loss, row entropy, batch entropy and entropy loss (float32 scalars); and
            (None, None, indices), int64 [B H W], with `remap` [B H W, 1].

        Raises:
            ValueError: `z` is not [B, e_dim, H, W].
        """
        if strided("z", z).ndim != 4 or z.shape[1] != self.e_dim:
            raise ValueError(f"z: expected [B, {self.e_dim}, H, W], got shape {list(z.shape)}")
        rows, codebook = rearrange(z, "b d h w -> b h w d").contiguous(), self.embedding.weight
        if z.dtype == torch.float64:
            rows, codebook = rows.float(), codebook.float()
        output, result = _quantize(
            rows,
            codebook if self.remap is None else codebook[self.used],
            self.beta,
            self.entropy_temperature,
            self.sample_minimization_weight,
            self.batch_maximization_weight,
            self.use_entropy_loss,
            self.process_group,
            self.backend,
            probability=True,
        )
        self._last = result.indices, result.max_probability
        quantized = rearrange(output.quantized, "b h w d -> b d h w").contiguous()
        quantized = quantized.double() if z.dtype == torch.float64 else quantized
        loss: QuantizerLoss = output.quant_loss
        if self.use_entropy_loss:
            loss = output[2:]
        indices = result.indices if self.remap is None else result.indices[:, None]
        return quantized, loss, (None, None, indices)

    def statistics(self) -> CodeStatistics:
        """How the last forward used the codebook, from what it kept: no other pass, no waiting.

        Raises:
            RuntimeError: there was no forward yet.
        """
        if self._last is None:
            raise RuntimeError("statistics: call the layer first")
        indices, max_probability = self._last
        size = self.n_e if self.remap is None else len(self.used)
        counts = torch.zeros(size, dtype=torch.int64, device=indices.device)
        counts.scatter_add_(0, indices, torch.ones_like(indices))
        share = counts.float() / max(1, len(indices))
        return CodeStatistics(
            usage=(counts > 0).float().mean(),
            perplexity=torch.special.entr(share).sum().exp(),
            max_probability=max_probability.sum() / max(1, len(indices)),
        )

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """The position of each index in `used`, or `unknown_index`; `inds` is [B, ...] int64."""
        ordered, position = self.used.to(inds).sort(stable=True)
        place = torch.searchsorted(ordered, inds.contiguous()).clamp_max(len(ordered) - 1)
        new, known = position[place], ordered[place] == inds
        if self.unknown_index == "random":
            unknown = torch.randint(self.re_embed, (int((~known).sum()),)).to(new)
            return new.masked_scatter(~known, unknown)
        return new.masked_fill(~known, int(self.unknown_index))

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """The index at each position of `used`; the extra one gives the first."""
        if self.re_embed > len(self.used):
            inds = inds.masked_fill(inds >= len(self.used), 0)
        return self.used.to(inds)[inds]

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """The code of each index.

        Args:
            indices: [N] int64, with `remap` positions in its list.
            shape: (B, H, W, D) to get [B, D, H, W], or None.

        Returns:
            [B, D, H, W], without `shape` [N, D], in the dtype of the codebook.
        """
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(-1))
        codes: Tensor = self.embedding(indices)
        if shape is None:
            return codes
        return rearrange(codes.view(shape), "b h w d -> b d h w").contiguous()
