"""The quantizer of TiTok as a drop-in layer."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from titok_fast._distributed import rank_and_size
from titok_fast.ops import inspect
from titok_fast.ops.arguments import check_sizes, check_weights, strided, without_autocast
from titok_fast.ops.nearest_code import BACKENDS, nearest_code


def _gather(x: Tensor) -> Tensor:
    """`x` of every rank, concatenated along dim 0 in rank order."""
    _, size = rank_and_size()
    if size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _mean_square(x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(x, y) if x.numel() else (x - y).square().sum()


class VectorQuantizer(nn.Module):
    """Vector quantization with a straight-through estimator, on the fused `nearest_code`.

    A drop-in for 1d-tokenizer's `VectorQuantizer`: same constructor, returns and state_dict
    (`embedding.weight`, and `embed_prob` with `clustering_vq`). The N x K distances are never
    held, and indices are exact in float64 where float32 distances pick a wrong code near ties.

    Args:
        codebook_size: number of codes K.
        token_size: dimension D of a code.
        commitment_cost: weight of the commitment loss.
        use_l2_norm: compare and return vectors of unit length (cosine distance).
        clustering_vq: while training, move rarely used codes to their nearest input
            (CVQ-VAE, arXiv 2307.15139), over the inputs of all ranks.
        backend: of `nearest_code`.

    Source: arXiv 2406.07550, section 3.1.
    """

    embed_prob: Tensor

    def __init__(
        self,
        codebook_size: int = 1024,
        token_size: int = 256,
        commitment_cost: float = 0.25,
        use_l2_norm: bool = False,
        clustering_vq: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_sizes(codebook_size=codebook_size, token_size=token_size)
        check_weights(commitment_cost=commitment_cost)
        inspect.check_backend(backend, BACKENDS)
        self.codebook_size = codebook_size
        self.token_size = token_size
        self.commitment_cost = commitment_cost
        self.use_l2_norm = use_l2_norm
        self.clustering_vq = clustering_vq
        self.backend = backend
        self.embedding = nn.Embedding(codebook_size, token_size)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        if clustering_vq:
            self.decay = 0.99
            self.register_buffer("embed_prob", torch.zeros(codebook_size))

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize a batch in float32, whatever autocast says.

        Args:
            z: latents [B, D, H, W], any floating dtype.

        Returns:
            Quantized latents [B, D, H, W], float32, whose gradient passes straight to `z`, and a
            dict of `quantizer_loss` (the sum of the next two), `commitment_loss`, `codebook_loss`
            (float32 scalars, of an empty batch 0) and `min_encoding_indices` [B, H, W], int64.

        Raises:
            TypeError: `z` is not a floating tensor.
            ValueError: `z` is not [B, token_size, H, W].
        """
        if not strided("z", z).is_floating_point():
            raise TypeError(f"z: dtype {z.dtype} is not a floating dtype")
        if z.ndim != 4 or z.shape[1] != self.token_size:
            raise ValueError(f"z: expected [B, {self.token_size}, H, W], got shape {list(z.shape)}")
        with without_autocast(z):
            return self._quantize(z.float())

    def _quantize(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = rearrange(z, "b d h w -> b h w d").contiguous()
        latents = z.detach()
        indices = self._nearest(latents, self.embedding.weight)  # [B, H, W]
        quantized = self.get_codebook_entry(indices.flatten()).float().view(z.shape)
        if self.use_l2_norm:
            z = F.normalize(z, dim=-1)

        commitment_loss = self.commitment_cost * _mean_square(z, quantized.detach())
        codebook_loss = _mean_square(quantized, z.detach())
        if self.clustering_vq and self.training:
            self._move_unused_codes(latents.flatten(0, 2), indices.flatten())

        quantized = z + (quantized - z).detach()
        return rearrange(quantized, "b h w d -> b d h w").contiguous(), {
            "quantizer_loss": commitment_loss + codebook_loss,
            "commitment_loss": commitment_loss,
            "codebook_loss": codebook_loss,
            "min_encoding_indices": indices,
        }

    def _nearest(self, z: Tensor, codebook: Tensor) -> Tensor:
        metric = "cosine" if self.use_l2_norm else "l2"
        return nearest_code(z.float(), codebook.float(), metric=metric, backend=self.backend)

    @torch.no_grad()
    def _move_unused_codes(self, latents: Tensor, indices: Tensor) -> None:
        """Update usage from `indices` [N] and pull codes towards inputs of `latents` [N, D]."""
        indices, latents = _gather(indices), _gather(latents)
        if indices.numel() == 0:
            return
        counts = torch.zeros_like(self.embed_prob)
        counts.scatter_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))
        self.embed_prob.mul_(self.decay).add_(counts / indices.numel(), alpha=1 - self.decay)
        # The nearest input of every code: the same search with the roles swapped.
        nearest = self._nearest(self.embedding.weight, latents)  # [K]
        usage = self.embed_prob * self.codebook_size * 10 / (1 - self.decay)
        pull = torch.exp(-usage - 1e-3)[:, None]  # [K, 1]
        # Through .data, as upstream: graphs that hold the old weight stay valid.
        self.embedding.weight.data.mul_(1 - pull).add_(latents[nearest] * pull)

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """The code of each index.

        Args:
            indices: [N] int64, or weights over the codes [N, K], floating.

        Returns:
            [N, D] in the dtype of the codebook, of unit length with `use_l2_norm`.
        """
        if indices.ndim == 1:
            codes = self.embedding(indices)
        elif indices.ndim == 2:
            codes = indices @ self.embedding.weight
        else:
            raise ValueError(f"indices: expected [N] or [N, K], got shape {list(indices.shape)}")
        return F.normalize(codes, dim=-1) if self.use_l2_norm else codes
