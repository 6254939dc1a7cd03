"""TiTok's encode and decode, whole models, against the official arithmetic in float32."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness
from bench.harness import Bench, Call, Provider
from titok_fast import TiTok
from titok_fast.models.blocks import ResidualAttentionBlock

# Multiplications and additions of one image, in GFLOP: the ViT, and the pixel decoder.
VIT, PIXELS = 177e9, 187e9
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Case(harness.Case):
    b: int
    model: str
    task: str


def cases(device: str, quick: bool) -> list[Case]:
    model = "titok-digits" if quick else "titok-l-32"
    batches = (2,) if quick else (1, 8) if device == "cpu" else (1, 64)
    return [
        Case(b=b, model=model, task=task, device=device, dtype=torch.float32)
        for b in batches
        for task in ("encode", "decode")
    ]


@lru_cache(maxsize=1)
def model_of(name: str, device: str) -> TiTok:
    """Generated weights: time does not depend on them."""
    torch.manual_seed(0)
    return TiTok.from_config(name).to(device).eval()


@lru_cache(maxsize=2)
def inputs(case: Case) -> tuple[Tensor]:
    model = model_of(case.model, case.device)
    generator = torch.Generator().manual_seed(1)
    if case.task == "encode":
        shape = (case.b, 3, model.image_size, model.image_size)
        return (torch.rand(shape, generator=generator).to(case.device),)
    shape = (case.b, model.num_latent_tokens)
    return (torch.randint(model.codebook_size, shape, generator=generator).to(case.device),)


def work(case: Case) -> tuple[int, int]:
    model = model_of(case.model, case.device)
    moved = sum(p.numel() * p.itemsize for p in model.parameters())
    if case.model != "titok-l-32":
        return 0, moved
    return int(case.b * (VIT if case.task == "encode" else VIT + PIXELS)), moved


class OfficialStack(nn.Module):
    """The official order of operations: sequence first, `nn.MultiheadAttention`."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in blocks)
        for block in self.blocks:
            own = block.attn
            attention = nn.MultiheadAttention(own.out_proj.in_features, own.num_heads)
            attention.load_state_dict(own.state_dict())
            block.attn = attention.to(own.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(1, 0, 2)
        for block in self.blocks:
            assert isinstance(block, ResidualAttentionBlock)
            hidden = block.ln_1(x)
            x = x + block.attn(hidden, hidden, hidden, need_weights=False)[0]
            x = x + block.mlp(block.ln_2(x))
        return x.permute(1, 0, 2)


@lru_cache(maxsize=1)
def official_model(name: str, device: str) -> TiTok:
    model = copy.deepcopy(model_of(name, device))
    for part in (model.encoder, model.decoder):
        part.transformer = nn.ModuleList([OfficialStack(part.transformer)])
    return model


def official_latents(case: Case, images: Tensor) -> Tensor:
    return official_model(case.model, case.device).latents(images)


def official_encode(case: Case, images: Tensor) -> Tensor:
    model = official_model(case.model, case.device)
    rows, codes = official_latents(case, images), model.quantize.embedding.weight
    if model.quantize.use_l2_norm:
        rows, codes = F.normalize(rows, dim=-1), F.normalize(codes, dim=-1)
    norms = rows.square().sum(-1, keepdim=True) + codes.square().sum(-1)
    return (norms - 2 * rows @ codes.T).argmin(-1)


def official_decode(case: Case, tokens: Tensor) -> Tensor:
    model = official_model(case.model, case.device)
    decoded = model.decoder(model._embed(tokens))
    if not model.finetune_decoder:
        return decoded
    codes = model.pixel_quantize.embedding.weight
    z, pixels = torch.einsum("nchw,cd->ndhw", decoded.softmax(1), codes), model.pixel_decoder
    x = pixels.mid(pixels.conv_in(z.contiguous()))
    for level in reversed(pixels.up):
        x = level(x)
    return pixels.conv_out(F.silu(pixels.norm_out(x)))


def prepare_official(case: Case, x: Tensor) -> Call:
    run = official_encode if case.task == "encode" else official_decode
    return lambda: run(case, x)


def prepare_ours(dtype: torch.dtype) -> Callable[[Case, Tensor], Call]:
    def prepare(case: Case, x: Tensor) -> Call:
        model = copy.deepcopy(model_of(case.model, case.device)).cast(dtype)
        model.to(memory_format=torch.channels_last)
        if case.device == "cuda":
            encode, decode = model.capture(case.b)
            run = encode if case.task == "encode" else decode
            return lambda: run(x.to(dtype) if case.task == "encode" else x)
        if case.task == "encode":
            return lambda: model.encode(x)
        return lambda: model.decode(x, clamp=False)

    return prepare


@lru_cache(maxsize=2)
def truth(case: Case) -> Tensor:
    """The official latents of the images, or the official pixels of the tokens."""
    run = official_latents if case.task == "encode" else official_decode
    with torch.no_grad():
        return run(case, *inputs(case)).float()


def check(case: Case, output: Tensor) -> tuple[int, int]:
    """Tokens whose code is clearly farther from the official latent than the best, or images that
    are not the official ones; 16-bit networks have a tolerance of their own."""
    sixteen_bits = output.dtype != torch.int64 and output.dtype.itemsize < 4
    if case.task == "decode":
        official = truth(case)
        official = official.clamp(0, 1) if case.device == "cuda" else official
        difference = (output.float() - official).flatten(1).norm(dim=1)
        allowed = TOLERANCE[torch.bfloat16 if sixteen_bits else torch.float32]
        return int((~(difference <= allowed * official.flatten(1).norm(dim=1))).sum()), case.b
    rows = F.normalize(truth(case), dim=-1)
    codes = F.normalize(model_of(case.model, case.device).quantize.embedding.weight, dim=-1)
    cosine = rows @ codes.T
    chosen = cosine.gather(-1, output.unsqueeze(-1)).squeeze(-1)
    return int((~(chosen >= cosine.amax(-1) - 0.05)).sum()), output.numel()


BENCH = Bench(
    op="titok",
    cases=cases,
    providers=(
        Provider("titok_fast-float32", prepare_ours(torch.float32), ours=True),
        Provider("titok_fast-bfloat16", prepare_ours(torch.bfloat16), ours=True),
        Provider("official", prepare_official),
    ),
    inputs=inputs,
    work=work,
    check=check,
)


def test_titok(measure, case, provider):
    measure(BENCH, case, provider)
